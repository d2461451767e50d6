"""The job of pipelines, from names to a run folder: fine-tune, judge, report.

A run folder holds config.json, checkpoint.safetensors, adapter/ or pipeline/ with a card, samples.safetensors (latents),
metrics.json, report.html, and WAV files of what can be heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.methods.registry import row_of
from tiltflow.pipelines.adapters import freeze, load_adapter, load_network, merge_adapter
from tiltflow.pipelines.card import card
from tiltflow.pipelines.embeddings import Rows
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.families import family_of
from tiltflow.pipelines.model import JOB, TiltedPipeline, compared, scored
from tiltflow.pipelines.names import load_pipeline, load_scores, require_diffusers
from tiltflow.pipelines.outcome import outcome
from tiltflow.pipelines.settings import PipelineConfig, PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline, require_applies, try_reward, untrained
from tiltflow.pipelines.watch import Watch
from tiltflow.rewards.combine import Score
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.train.store import write_text
from tiltflow.verdict.line import REWARD, Verdict, overall

ADAPTER, PIPELINE, CARD = "adapter", "pipeline", "README.md"
"""Folders of what was trained, low-rank or all weights, and the card in them."""
TRIAL, FEW = 2, 8
"""Rows of the check; the fewest samples that are judged when the run is planned."""


@settings
class PipelineJob(PipelineConfig):
    """A run that fine-tunes a pipeline."""

    name: ClassVar[str] = JOB
    writes: ClassVar[tuple[str, ...]] = (f"{ADAPTER}/*", f"{PIPELINE}/*", "*-[0-9]*.wav")

    def config(self) -> dict[str, Any]:
        """The fields as JSON; files and folders by their absolute paths."""
        named = {name: anchored(value) for name in ("pipeline", "reward", "single_file") if (value := getattr(self, name))}
        if self.embeddings:
            named["embeddings"] = str(Path(self.embeddings).resolve())
        return as_json(self) | named | {"judges": [anchored(judge) for judge in self.judges]}

    @classmethod
    def read(cls, config: dict[str, Any], folder: Path) -> Self:
        """The job of a config.json."""
        fields = {k: v for k, v in config.items() if k not in ("job", "format")}
        return from_json(cls, fields, str(folder / "config.json"))

    @cached_property
    def pipe(self) -> Any:
        """The pipeline on its device, loaded once."""
        if self.pipeline is None:
            raise TiltflowError("this run was saved from Python: give its pipeline, load(folder, pipe=…, reward=…).")
        return load_pipeline(self.pipeline, self.device, self.dtype, self.variant, self.single_file)

    @property
    def training(self) -> PipelineSettings:
        """How it trains."""
        return self.settings

    def trial(self, training: Mapping[str, Any], share: float) -> tuple[Self, float]:
        """With other settings of the training, and a share of the samples, without looks at the judges."""
        share = max(share, min(FEW, self.samples) / self.samples)
        settings = replace(self.settings, **training)
        return replace(self, samples=round(share * self.samples), monitor=0, settings=settings), share

    def scores(self, judged: bool = True) -> dict[str, Score]:
        """The reward and, where something is ``judged``, the judges, by name."""
        if self.reward is None:
            raise TiltflowError("this run was saved from Python: give its reward, load(folder, pipe=…, reward=…).")
        return load_scores(self.reward, self.judges if judged else ())

    def check(self) -> None:
        """Find misuse: the method, λ, the pipeline, and what reward and judges return for what it makes of noise."""
        row, scores = row_of(self.method, "finetune"), self.scores()
        require_applies(row, self.settings)
        require_diffusers()
        texts = self.prompts[:TRIAL]
        rows = encode_prompts(self.pipe, list(texts), self.negative, family=family_of(self.pipe, self.settings.arguments))
        model = untrained(
            self.pipe, rows, scores[REWARD], texts, self.negative, self.strength, row, self.settings, None
        )  # fmt: skip
        generator = torch.Generator(str(model.chain.device)).manual_seed(self.seed)
        try:
            try_reward(model, generator)
            decoded = model.decode(model.chain.source(TRIAL, generator))
            for name, score in scores.items():
                with torch.no_grad():
                    scored(name, score, decoded, [texts[i % len(texts)] for i in range(TRIAL)])
        except TiltflowError:
            raise
        except Exception as error:
            what = f"the reward or a judge raised {type(error).__name__}"
            raise TiltflowError(f"{what} on {TRIAL} samples: {error}") from error

    def load(
        self,
        folder: Path,
        device: str = "cpu",
        pipe: Any = None,
        reward: Score | None = None,
        rows: Rows | None = None,
    ) -> TiltedPipeline:
        """The model of a finished run folder, or of what a model's ``save`` wrote.

        Args:
            folder: Where it is.
            device: Of the pipeline, unless it is given.
            pipe: The base pipeline in place of the one that the run names; what was trained is put on it.
            reward: In place of the run's.
            rows: The prompts encoded, as for :func:`tiltflow.finetune_pipeline`.
        """
        row = row_of(self.method, "finetune")
        reward = self.scores(judged=False)[REWARD] if reward is None else reward
        pipe = replace(self, device=device).pipe if pipe is None else pipe
        freeze(pipe)
        rows = self.encoded(pipe) if rows is None else rows
        if row.trained:
            self._put_on(pipe, folder)
        network = getattr(pipe, family_of(pipe).network) if row.trained else None
        return untrained(pipe, rows, reward, self.prompts, self.negative, self.strength, row, self.settings, network)

    def encoded(self, pipe: Any) -> Rows:
        """Its prompts, of the folder that keeps them if there is one."""
        family = family_of(pipe, self.settings.arguments)
        return encode_prompts(pipe, list(self.prompts), self.negative, self.embeddings, family)

    def _put_on(self, pipe: Any, folder: Path) -> None:
        """What was trained, on its base pipeline."""
        found = [folder / name for name in (ADAPTER, PIPELINE) if (folder / name).is_dir()]
        (load_network if self.settings.rank is None else load_adapter)(pipe, found[0] if found else folder)

    def export(self, folder: Path, out: Path, device: str) -> None:
        """Write the pipeline with the adapter of a finished run merged into it. Raises TiltflowError if there is none."""
        if self.settings.rank is None:
            raise TiltflowError(f"all weights were trained: {folder / PIPELINE} is the pipeline already.")
        if not (folder / ADAPTER).is_dir():
            raise TiltflowError(f"{folder} holds no finished run of finetune-pipeline with an adapter.")
        pipe = replace(self, device=device).pipe
        load_adapter(pipe, folder / ADAPTER)
        merge_adapter(pipe)
        pipe.save_pretrained(out, safe_serialization=True)

    def draw(
        self, folder: Path, n: int, asked: dict[str, Any], seed: int, device: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """n new samples, decoded, with the numbers of their prompts, and their mean reward."""
        if other := [name for name in asked if name != "exact"]:
            raise TiltflowError(f"{folder} is a pipeline's run, drawn by its own chain only: leave out {', '.join(other)}.")
        model = self.load(folder, device)
        x, prompt = model.sample(n, seed, **asked), model.turns(n)
        reward = scored(REWARD, model.reward, x, [model.prompts[i] for i in prompt.tolist()], model.chain.micro_batch)
        return {"samples": x, "prompt": prompt}, {"reward": float(reward.mean())}

    def train(self, work: Work) -> tuple[TiltedPipeline, Watch]:
        """Train the pipeline, under the eyes of the judges."""
        scores = self.scores()
        judges = {name: score for name, score in scores.items() if name != REWARD}
        watch = Watch(self.monitor, judges, self.samples, self.seed)

        def callback(row: dict[str, Any], tilted: TiltedPipeline) -> bool:
            enough = watch(tilted, row)
            work.round(row, "fine-tuning", self.settings.rounds)
            return enough

        model = finetune_pipeline(
            self.pipe, scores[REWARD], self.prompts, self.strength, self.method, self.settings, seed=self.seed,
            negative=self.negative, rows=self.encoded(self.pipe), checkpoint=work.checkpoint, resume=work.resume,
            callback=callback,
        )  # fmt: skip
        return model, watch

    def judge(self, model: tuple[TiltedPipeline, Watch], work: Work) -> Outcome:
        """Save and judge."""
        tilted, watch = model
        place = work.path / (PIPELINE if self.settings.rank is None else ADAPTER)
        tilted.save_weights(place)
        judges = {name: score for name, score in self.scores().items() if name != REWARD}
        before, after = tilted.before_and_after(judges, self.samples, self.seed, work.tell)
        found = compared(before, after)
        lines = [*found.lines, *watch.lines()]
        verdict = Verdict(overall(lines), lines, found.scores)
        summary = {
            "pipeline": self.pipeline,
            "reward": self.reward,
            "strength": self.strength,
            "method": self.method,
            "kl": float(after.kl.mean()) if tilted.row.trained else None,
            "rounds": len(tilted.history),
            "train_seconds": sum(row["seconds"] for row in tilted.history),
        }
        if tilted.row.trained:
            means = {f"{s.name}_{part}": getattr(s, part) for s in found.scores for part in ("base", "reached")}
            write_text(place / CARD, card(self, summary | means, verdict.status, work.head["command"]))
        title = f"{Path(str(self.pipeline)).name} tilted towards {self.reward}, λ = {self.strength:g}"
        return outcome(tilted, title, summary, verdict, before, after, work.path)
