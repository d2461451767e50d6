"""A tilted pipeline: what is judged, what is sampled and what is saved are the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.progress import Tell, silent
from tiltflow.core.settings import as_json
from tiltflow.core.simulate import Samples, sample
from tiltflow.core.weights import exact_draws, systematic
from tiltflow.methods.registry import Row
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.pipelines.adapters import save_adapter, trains_all
from tiltflow.pipelines.chain import Adapted, DecodedReward, PipelineChain, in_parts
from tiltflow.pipelines.encode import HOST, encode_prompts, encoders_on
from tiltflow.pipelines.outcome import outcome
from tiltflow.pipelines.settings import PipelineSettings, check_prompts
from tiltflow.rewards.combine import Score
from tiltflow.run.job import report
from tiltflow.run.open import save_model
from tiltflow.verdict.line import REWARD, Verdict, overall
from tiltflow.verdict.line import Score as Mean
from tiltflow.verdict.paired import Judged, against_base

JOB = "finetune-pipeline"
EVALUATION_SEED = 1_000
"""Added to the seed for the samples that are judged."""
FEWEST = 16
"""Effective draws behind exact samples of a prompt."""


@dataclass(frozen=True, eq=False)
class TiltedPipeline:
    """A pipeline that samples p_base(x | prompt)·e^{λr(decoded x, prompt)} in its base's place.

    Args:
        pipe: The pipeline, its adapter on: stock diffusers may use it as it is.
        chain: The base as the chain that it was trained on.
        control: The network with its adapter on, under the guidance of samples; None if nothing is trained.
        reward: r, of what the pipeline makes and of texts.
        prompts: The texts that it was trained on.
        negative: Negative prompt; None: the pipeline's own.
        strength: λ.
        row: The method.
        settings: Of the training.
        history: One dict per round of training.
    """

    pipe: Any
    chain: PipelineChain
    control: Adapted | None
    reward: Score
    prompts: tuple[str, ...]
    negative: str | None
    strength: float
    row: Row
    settings: PipelineSettings
    history: list[dict[str, Any]]

    @property
    def cost(self) -> RewardCost:
        """−λr of latents."""
        decoded = DecodedReward(self.chain, self.reward, self.prompts)
        return RewardCost(decoded, self.strength, self.settings.max_cost_gradient)

    @property
    def sampled(self) -> PipelineChain:
        """The base under the guidance of samples, which they are told against."""
        return self.chain if self.control is None else replace(self.chain, guidance=self.control.guidance)

    def sample(self, prompts: int | Sequence[str], seed: int = 0, exact: bool = False) -> Tensor:
        """What it makes: images (n, 3, H, W) in [0, 1], or audio (n, channels, samples).

        Args:
            prompts: One text a sample; or how many samples, over the prompts of the training in turn.
            seed: Of the draws; with the same seed, the base's samples have the same noise.
            exact: Weight paths by their path weights and resample, prompt by prompt: the chain's own tilt, whatever was
                learned, for 16 and more paths a prompt.

        Raises:
            TiltflowError: no prompt, less than one sample, or path weights too uneven to be exact.
        """
        if isinstance(prompts, int):
            return self.decode(self._exact(prompts, seed) if exact and self.row.trained else self.paths(prompts, seed).x)
        check_prompts(prompts)
        rows = encode_prompts(self.pipe, list(prompts), self.negative, family=self.chain.family)
        other = replace(self, chain=replace(self.chain, rows=rows), prompts=tuple(prompts))
        return other.sample(len(prompts), seed, exact)

    def _exact(self, n: int, seed: int) -> Tensor:
        """n latents among weighted paths of the same prompt."""
        generator, out = torch.Generator(str(self.chain.device)).manual_seed(EVALUATION_SEED + seed), None
        turns = self.turns(n)
        for number in turns.unique().tolist():
            rows = torch.nonzero(turns == number)[:, 0]
            x = exact_draws(partial(self._weighted, number, seed), len(rows), FEWEST, generator)
            out = x.new_empty(n, *x.shape[1:]) if out is None else out
            out[rows.to(out.device)] = x
        assert out is not None
        return out

    def _weighted(self, number: int, seed: int, n: int, call: int) -> tuple[Tensor, Tensor]:
        """End points of n paths of a prompt, and their log weights."""
        prompt = torch.full((n,), number)
        drawn = self._walked(prompt, seed + 1_000_003 * (1 + number + len(self.prompts) * call))
        return drawn.x, drawn.log_ratio - self.cost.value(drawn.x, prompt=prompt).detach()

    @torch.no_grad()
    def paths(self, n: int, seed: int = 0, base: bool = False) -> Samples:
        """n end points, latents, with what their paths say, over the prompts in turn; ``base``: of the base."""
        if n < 1:
            raise TiltflowError(f"the number of samples must be at least 1, got {n}.")
        if not (self.row.trained or base):
            return self._drawn(self.turns(n), torch.Generator(str(self.chain.device)).manual_seed(EVALUATION_SEED + seed))
        return self._walked(self.turns(n), seed, base)

    @torch.no_grad()
    def _walked(self, prompt: Tensor, seed: int, base: bool = False) -> Samples:
        """End points of the chain under prompts, by their numbers."""
        generator = torch.Generator(str(self.chain.device)).manual_seed(EVALUATION_SEED + seed)
        control = None if self.control is None else replace(self.control, on=not base)
        return sample(self.sampled, control, self.chain.source(len(prompt), generator), generator, prompt=prompt)

    def turns(self, n: int) -> Tensor:
        """The numbers of the prompts of n samples."""
        return torch.arange(n) % len(self.prompts)

    def _drawn(self, prompt: Tensor, generator: torch.Generator) -> Samples:
        """End points by a method that trains nothing, prompt by prompt; what is weighted is resampled."""
        method = self.row.made(chain=self.chain, cost=self.cost)
        x = self.chain.source(len(prompt), generator)
        for number in prompt.unique():
            rows = torch.nonzero(prompt == number)[:, 0].to(x.device)
            drawn = method.sample(None, len(rows), generator, prompt=number.expand(len(rows)))
            x[rows] = drawn.x[systematic(drawn.log_weights.double(), generator)]
        zeros = x.new_zeros(len(x))
        return Samples(x, zeros, zeros, zeros, None)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents as images or audio."""
        return in_parts(lambda x: self.chain.family.decode(self.pipe, x), self.chain.micro_batch, x)

    @torch.no_grad()
    def judge(self, scores: Mapping[str, Score], samples: int, seed: int = 0, base: bool = False) -> Judged:
        """Samples over the prompts in turn, and their ``scores``; ``base``: of the base, in the same noise.

        Decoded and scored ``micro_batch`` at a time, each once, and then kept on the host. Diversity is the mean distance
        of pairs with the same prompt, or of all pairs if no two have the same.

        Raises:
            TiltflowError: a score that does not return one number a sample, naming it.
        """
        drawn, prompt = self.paths(samples, seed, base), self.turns(samples)
        values: dict[str, list[Tensor]] = {name: [] for name in scores}
        seen, size = [], self.chain.micro_batch or samples
        for x, numbers in zip(drawn.x.split(size), prompt.split(size), strict=True):
            decoded, texts = self.decode(x), [self.prompts[i] for i in numbers.tolist()]
            for name, score in scores.items():
                values[name].append(scored(name, score, decoded, texts))
            seen.append(decoded.cpu())
        made = torch.cat(seen)
        groups = [made[prompt == i] for i in prompt.unique().tolist()]
        several = [group for group in groups if len(group) > 1] or [made]
        distances = [pairwise_mean(group)[0] for group in several]
        found = {name: torch.cat(parts) for name, parts in values.items()}
        return Judged(drawn.x, found, drawn.kl, sum(distances) / len(distances))

    def verdict(
        self, judges: Mapping[str, Score] | None = None, samples: int = 64, seed: int = 0, tell: Tell = silent
    ) -> Verdict:
        """Did the reward rise, did the judges not fall, is the diversity still there? Against the base, in the same noise.

        Args:
            judges: Held-out scores by name, ``(images or audio, texts) -> (n,)``.
            samples: How many of each, at least 2.
            seed: Of the samples.
            tell: Told what is going on: (what, done, total, note).
        """
        return compared(*self.before_and_after(judges or {}, samples, seed, tell))

    def before_and_after(
        self, judges: Mapping[str, Score], samples: int, seed: int = 0, tell: Tell = silent
    ) -> tuple[Judged, Judged]:
        """Base and tilted samples with the reward and the judges' scores. Raises TiltflowError for less than 2 samples."""
        if samples < 2 or REWARD in judges:
            raise TiltflowError(f"a verdict needs at least 2 samples, got {samples}, and no judge called {REWARD!r}.")
        scores, found = {REWARD: self.reward, **judges}, []
        with encoders_on(self.pipe, HOST):
            for i, base in enumerate((True, False)):
                tell("samples to judge", i, 2, "")
                found.append(self.judge(scores, samples, seed, base))
        tell("samples to judge", 2, 2, "")
        return found[0], found[1]

    def report(
        self, folder: Path | str, judges: Mapping[str, Score] | None = None, samples: int = 64, seed: int = 0
    ) -> Path:
        """Write ``folder/report.html``: the verdict, samples before and after, scores, how training went. Returns its path.

        Args:
            folder: Where; it is made if there is none.
            judges: Held-out scores by name.
            samples: How many of each.
            seed: Of the samples.
        """
        before, after = self.before_and_after(judges or {}, samples, seed)
        summary = {"kl": float(after.kl.mean()) if self.row.trained else None}
        title = f"{type(self.pipe).__name__} tilted by {self.row.name}, λ = {self.strength:g}"
        found = outcome(self, title, summary, compared(before, after), before, after, Path(folder))
        return report(found, folder, {"method": self.row.name, **as_json(self.settings)})

    def save(self, folder: Path | str) -> Path:
        """Write the model into a new folder, for stock diffusers, and for :func:`tiltflow.load` with ``pipe=``, ``reward=``.

        It holds the adapter, for ``pipe.load_lora_weights(folder)``; or, where all weights were trained, the pipeline.

        Raises:
            TiltflowError: the folder exists and is not empty, or the method is not one of the table.
        """
        return save_model(
            folder, JOB, self.row.name, self.save_weights, pipeline=None, reward=None, prompts=list(self.prompts),
            strength=self.strength, negative=self.negative, settings=as_json(self.settings),
        )  # fmt: skip

    def save_weights(self, folder: Path) -> None:
        """The adapter for stock diffusers, or the pipeline with all its weights; nothing where nothing was trained."""
        if not self.row.trained:
            return
        if trains_all(self.chain.network):
            self.pipe.save_pretrained(folder, safe_serialization=True)
        else:
            save_adapter(self.pipe, folder)


def scored(name: str, score: Score, decoded: Tensor, texts: list[str], size: int | None = None) -> Tensor:
    """Values of a score, (n,) in float64 on the CPU, asked for ``size`` rows at a time (None: all); it is given copies.

    Raises:
        TiltflowError: it returned another shape.
    """
    found = []
    for i in range(0, len(decoded), size or len(decoded)):
        part = decoded[i : i + (size or len(decoded))]
        values = score(part.clone(), texts[i : i + len(part)])
        if not isinstance(values, Tensor) or values.shape != (len(part),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise TiltflowError(f"{name} returned {got} for {len(part)} samples; it must return one number each, (n,).")
        found.append(values.detach().cpu().double())
    return torch.cat(found)


def compared(before: Judged, after: Judged) -> Verdict:
    """The verdict on samples of base and tilted pipeline in the same noise."""
    lines = against_base(before, after)
    means = [Mean(name, float(before.scores[name].mean()), None, float(after.scores[name].mean())) for name in after.scores]
    return Verdict(overall(lines), lines, [*means, Mean("diversity", before.diversity, None, after.diversity)])
