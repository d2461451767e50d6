"""A tilted model: what is judged, what is sampled and what is saved are the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.chain import InterpolantChain
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.progress import Tell, silent
from tiltflow.core.settings import as_json
from tiltflow.core.simulate import Samples
from tiltflow.core.weights import exact_draws, systematic
from tiltflow.methods.registry import Row
from tiltflow.run.job import report
from tiltflow.run.open import save_model
from tiltflow.tilting.draw import CHAIN, ODE, draw_paths, draw_process
from tiltflow.tilting.outcome import Case, Evaluation, Judgement, outcome
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.weights import save_chain, save_network
from tiltflow.train.method import Conditions
from tiltflow.verdict.line import AS_DRAWN, BY_ODE, REWARD, Verdict
from tiltflow.verdict.tilt import BASE, TRUTH, judge_samples, scored

FEWEST, CASES, BATCH = 200, 8, 1_000
"""Effective draws behind exact samples; conditions that a report judges; samples that are drawn together."""
EVALUATION_SEED = 1_000
"""Added to the seed for the samples that are judged."""


@dataclass(frozen=True)
class TiltedModel:
    """A base and the model that samples p_base(x)·e^{λr(x)} in its place.

    Args:
        base: The pretrained process.
        process: The fine-tuned one, which predicts what the base predicts; the base itself for a training-free method.
        chain: The base on the grid that it was trained on.
        cost: −λr.
        row: The method.
        settings: Of the training.
        conditions: Draws condition rows, if the base has any.
        history: One dict per round of training.
    """

    base: Process
    process: Process
    chain: InterpolantChain
    cost: RewardCost
    row: Row
    settings: FinetuneSettings
    conditions: Conditions | None
    history: list[dict[str, Any]]

    @property
    def module(self) -> nn.Module:
        """The fine-tuned network, ``(x, t, **condition)``, which predicts what the base predicts.

        Raises:
            TiltflowError: the method trains nothing.
        """
        if not self.row.trained:
            raise TiltflowError(f"the method {self.row.name!r} trains no network; it samples from the base.")
        return FineTuned(self.process).module

    def sample(
        self,
        n: int,
        noise: str | float = CHAIN,
        steps: int | None = None,
        exact: bool = False,
        seed: int = 0,
        method: str = "heun",
        **condition: Any,
    ) -> Tensor:
        """n samples (n, *event).

        Args:
            n: How many.
            noise: "chain" (the one it was trained on, which is also what a verdict judges), "ode", "memoryless", or σ ≥ 0.
            steps: Simulation steps; None: those of the training.
            exact: Weight paths of the chain by their path weights and resample: the chain's own tilt, whatever was learned;
                as many paths as it takes for n effective draws.
            seed: Of the draws.
            method: Of the ODE: euler, heun, or an adaptive one of torchdiffeq.
            condition: Condition rows, of one row or of n.

        Raises:
            TiltflowError: an unknown noise, one that the model was not trained for, or path weights too uneven to be exact.
        """
        generator = self._generator(seed)
        if exact and (noise != CHAIN or steps is not None):
            raise TiltflowError("exact samples are weighted paths of the training chain: leave out noise and steps.")
        if exact and self.row.trained:
            return self._exact(n, seed, generator, condition)
        if noise == CHAIN and steps is None:
            return self.paths(n, seed, **condition).x
        if not self.row.trained:
            raise TiltflowError(f"the method {self.row.name!r} has one way of sampling: leave out noise and steps.")
        rows = {name: v.expand(n, *v.shape[1:]) for name, v in condition.items()}
        count = steps or self.settings.steps
        return draw_process(self.process, n, str(noise), count, method, generator, self.settings, **rows)

    def _exact(self, n: int, seed: int, generator: torch.Generator, condition: dict[str, Any]) -> Tensor:
        """n draws among weighted paths of the same condition."""
        out: Tensor | None = None
        for i, rows in enumerate(_alike(condition, n)):
            one = {name: v[rows[:1]] if len(v) > 1 else v for name, v in condition.items()}
            x = exact_draws(partial(self._weighted, seed + i, one), len(rows), FEWEST, generator)
            out = x.new_empty(n, *x.shape[1:]) if out is None else out
            out[rows.to(out.device)] = x
        assert out is not None
        return out

    def _weighted(self, seed: int, condition: dict[str, Any], n: int, call: int) -> tuple[Tensor, Tensor]:
        """End points of n paths, and their log weights."""
        drawn = self.paths(n, seed + 1_000_003 * call, **condition)
        return drawn.x, self.log_weights(drawn, **condition)

    def paths(
        self, n: int, seed: int = 0, tell: Callable[[int], None] = lambda done: None, **condition: Any
    ) -> Samples:
        """n end points of the training chain with what their paths say (zeros for a training-free method)."""
        generator = self._generator(seed)
        if self.row.trained:
            return draw_paths(self.chain, FineTuned(self.process), n, generator, tell, **condition)
        alike = {name: v.expand(n, *v.shape[1:]) for name, v in condition.items()}
        drawn = self.row.made(chain=self.chain, cost=self.cost).sample(None, n, generator, **alike)
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
        zeros = drawn.x.new_zeros(n)
        tell(n)
        rows = systematic(drawn.log_weights, generator)[order].to(drawn.x.device)
        return Samples(drawn.x[rows], zeros, zeros, zeros, None)

    def log_weights(self, drawn: Samples, **condition: Any) -> Tensor:
        """log w = λr + log dP_base/dP_u of paths, (n,)."""
        rows = {name: v.expand(len(drawn.x), *v.shape[1:]) for name, v in condition.items()}
        return -self.cost.value(drawn.x, **rows).detach() + drawn.log_ratio

    def verdict(
        self,
        judges: Mapping[str, Callable[..., Tensor]] | None = None,
        samples: int = 4_000,
        reference_samples: int = 20_000,
        seed: int = 0,
        truth: Tensor | None = None,
        tell: Tell = silent,
        **condition: Any,
    ) -> Verdict:
        """Is it right? Samples of the model against base samples weighted by e^{λr}.

        Args:
            judges: Held-out scores by name, ``(x, **condition) -> (B,)``.
            samples: Samples of the model.
            reference_samples: Samples of the base.
            seed: Of both.
            truth: Exact samples of the tilt, if there are any.
            tell: Told what is going on: (what, done, total, note).
            condition: One condition row for all samples.
        """
        base = self.base_samples(reference_samples, seed, tell, **condition)
        drawn = self.paths(samples, seed + 1, lambda done: tell("samples of the model", done, samples, ""), **condition)
        flowed = self.flowed(samples, seed, tell, **condition)
        return self.judge(drawn, base, judges or {}, seed, truth, flowed, tell, **condition).verdict

    def base_samples(self, n: int, seed: int = 0, tell: Tell = silent, **condition: Any) -> Tensor:
        """n samples of the base by the training chain."""
        told = partial(tell, "samples of the base")
        return draw_paths(self.chain, None, n, self._generator(seed), lambda done: told(done, n, ""), **condition).x

    def flowed(self, n: int, seed: int = 0, tell: Tell = silent, **condition: Any) -> Tensor | None:
        """n samples by the ODE; None if the model was not trained for it."""
        if not self.row.trained or self.settings.chi != 0 or self.settings.sigma is not None:
            return None
        parts: list[Tensor] = []
        for start in range(0, n, BATCH):
            size = min(BATCH, n - start)
            parts.append(self.sample(size, noise=ODE, seed=seed + EVALUATION_SEED * (1 + len(parts)), **condition))
            tell("samples by the ODE", start + size, n, "")
        return torch.cat(parts)

    def judge(
        self,
        drawn: Samples,
        base_samples: Tensor,
        judges: Mapping[str, Callable[..., Tensor]],
        seed: int = 0,
        truth: Tensor | None = None,
        flowed: Tensor | None = None,
        tell: Tell = silent,
        **condition: Any,
    ) -> Judgement:
        """The verdict on samples that are drawn already: paths, of the base, exact ones (truth), by the ODE (flowed)."""

        def given(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x: score(x, **{name: v.expand(len(x), *v.shape[1:]) for name, v in condition.items()})

        drawings = {AS_DRAWN: drawn.x, BASE: base_samples, BY_ODE: flowed, TRUTH: truth}
        sets = {name: x for name, x in drawings.items() if x is not None}
        cost = replace(self.cost, reward=given(self.cost.reward))
        values = scored(cost, {name: given(judge) for name, judge in judges.items()}, sets, tell)
        log_ratio = drawn.log_ratio if self.row.trained else None
        own = torch.Generator().manual_seed(seed)
        verdict = judge_samples(sets, values, log_ratio, own, strength=cost.strength, tell=tell)
        return Judgement(verdict, values[REWARD][AS_DRAWN], values[REWARD][BASE])

    def report(
        self,
        folder: Path | str,
        judges: Mapping[str, Callable[..., Tensor]] | None = None,
        samples: int = 4_000,
        reference_samples: int = 20_000,
        seed: int = 0,
    ) -> Path:
        """Write ``folder/report.html``: the verdict, samples before and after, scores, how training went. Returns its path.

        Args:
            folder: Where; it is made if there is none.
            judges: Held-out scores by name.
            samples: Samples of the model.
            reference_samples: Samples of the base.
            seed: Of both.
        """
        rows = {} if self.conditions is None else self.conditions(CASES, self._generator(seed))
        cases: list[Case] = [({k: v[i : i + 1] for k, v in rows.items()}, {}) for i in range(CASES if rows else 1)]
        how = Evaluation(judges or {}, tuple(cases), True, samples, reference_samples, seed)
        return report(outcome(self, how), folder, {"method": self.row.name, **as_json(self.settings)})

    def save_weights(self, folder: Path) -> None:
        """The chain, and what was trained (:mod:`tiltflow.tilting.weights`), into a folder."""
        save_chain(folder, self.chain)
        if self.row.trained:
            save_network(folder, self.process)

    def save(self, folder: Path | str) -> Path:
        """Write the model into a new folder, for :func:`tiltflow.load` with ``base=`` and ``reward=``.

        Raises:
            TiltflowError: the folder exists and is not empty, or the method is not one of the table.
        """
        return save_model(
            folder, "finetune", self.row.name, self.save_weights, base=None, reward=None, strength=self.cost.strength,
            settings=as_json(self.settings),
        )  # fmt: skip

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(EVALUATION_SEED + seed)

    @property
    def device(self) -> torch.device:
        """Where its network lives."""
        model = self.process.model
        found = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        return torch.device("cpu") if found is None else found.device


def _alike(condition: Mapping[str, Tensor], n: int) -> list[Tensor]:
    """The numbers of rows that have the same condition, one tensor for each condition."""
    rows = [double(v.expand(n, *v.shape[1:]).reshape(n, -1)) for v in condition.values()]
    if not rows:
        return [torch.arange(n)]
    group = torch.cat(rows, 1).unique(dim=0, return_inverse=True)[1]
    return [torch.nonzero(group == i)[:, 0] for i in group.unique()]
