"""A tilted model judged: its verdict under every condition, the numbers beside it, and what a report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.progress import Tell, silent
from tiltflow.core.weights import ess, evidence, normalised
from tiltflow.report import gallery, scores_table, training_blocks, ways_table
from tiltflow.report.figures import TILTING
from tiltflow.report.page import Block
from tiltflow.report.samples import SAME_NOISE
from tiltflow.run.job import Outcome
from tiltflow.tilting.chain import ends_noiselessly
from tiltflow.verdict.line import AS_DRAWN, BY_ODE, EXACT, Line, Score, Verdict, best_way

GRID = 64
"""Samples that are shown."""
COMMANDS = {AS_DRAWN: "tiltflow sample RUN", BY_ODE: "tiltflow sample RUN --noise ode", EXACT: "tiltflow sample RUN --exact"}
"""How a user gets the samples of each way."""
Case = tuple[dict[str, Any], dict[str, Any]]
"""A condition, one row, and what only the judges see of it."""


class Judgement(NamedTuple):
    """A verdict, and λr of the samples and of the base's that it rests on, (n,) each."""

    verdict: Verdict
    reached: Tensor
    base: Tensor


Tilted = Any
"""A :class:`~tiltflow.tilting.model.TiltedModel`, whose module imports this one."""


@dataclass(frozen=True)
class Evaluation:
    """How a model is judged.

    Args:
        judges: Held-out scores by name.
        cases: The conditions that it is judged under.
        conditional: Whether the base sees them too; if not, it is drawn once for all.
        samples: Samples of the model, under each condition.
        reference_samples: Samples of the base that, weighted by e^{λr}, stand for the exact tilt.
        seed: Of all draws.
        base: What the base is called.
        reward: What the reward is called.
        tell: Told what is going on.
    """

    judges: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    cases: tuple[Case, ...] = (({}, {}),)
    conditional: bool = True
    samples: int = 4_000
    reference_samples: int = 20_000
    seed: int = 0
    base: str = "the base"
    reward: str = "the reward"
    tell: Tell = silent


class Found(NamedTuple):
    """What one condition (or the only one) came out as."""

    verdict: Verdict
    row: dict[str, Any]
    base: Tensor
    log_forward: Tensor
    tensors: dict[str, Tensor]


def outcome(model: Tilted, how: Evaluation) -> Outcome:
    """The outcome under all conditions: their lines, the means of their numbers, the pictures of the first."""
    condition = how.cases[0][0]
    shared = None if how.conditional and condition else model.base_samples(how.reference_samples, how.seed, how.tell)
    found = [_assess(model, how, shared, *case) for case in how.cases]
    lines: list[Line] = []
    for i, one in enumerate(found):
        suffix = f" (unseen {i + 1})" if len(found) > 1 else ""
        lines += [line._replace(name=line.name + suffix) for line in one.verdict.lines]
    scores = [
        Score(parts[0].name, *(_mean([getattr(s, name) for s in parts]) for name in Score._fields[1:]))
        for parts in zip(*(one.verdict.scores for one in found), strict=True)
    ]
    verdict = best_way(lines, scores)
    own = " --trust" if ":" in how.base + how.reward else ""  # code of the user's
    ways = [{"kind": "way", "name": n, "status": answer, "command": COMMANDS[n] + own} for n, answer in verdict.ways.items()]
    row = {name: _mean([one.row[name] for one in found]) for name in found[0].row}
    tensors = dict(found[0].tensors)
    shown = {"Samples": tensors["samples"][:GRID]}
    if model.row.trained:
        before = model.base_samples(GRID, how.seed + 2, **condition)
        after = model.paths(GRID, how.seed + 2, **condition).x
        shown = {"Before": before, "After": after, "Reference": _reference(found[0], how.seed)}
        tensors |= {"before": before, "after": after}
    return Outcome(
        title=f"{how.base} tilted towards {how.reward}, λ = {model.cost.strength:g}",
        summary={
            "base": how.base,
            "reward": how.reward,
            "strength": model.cost.strength,
            "method": model.row.name,
            **row,
            "train_seconds": sum(h["seconds"] for h in model.history),
        },
        verdict=verdict,
        rows=ways,
        tensors=tensors,
        history=model.history,
        facts={"path ESS, of 1": row["path_ess"]},
        notes=_notes(model, how),
        draw=lambda: _blocks(model, scores, row, shown, ways),
    )


def _assess(
    model: Tilted, how: Evaluation, base: Tensor | None, condition: dict[str, Any], judged: dict[str, Any]
) -> Found:
    """Draw under one condition, and hold it against the weighted base (None: drawn under the condition too)."""
    if base is None:
        base = model.base_samples(how.reference_samples, how.seed, how.tell, **condition)
    n = how.samples
    drawn = model.paths(n, how.seed + 1, lambda done: how.tell("samples of the model", done, n, ""), **condition)
    judges = {name: _seeing(judge, judged) for name, judge in how.judges.items()}
    flowed = model.flowed(n, how.seed, how.tell, **condition)
    found = model.judge(drawn, base, judges, how.seed, flowed=flowed, tell=how.tell, **condition)
    verdict, reached, log_forward = found
    forward = evidence(log_forward)
    row = {"reference_ess": ess(log_forward), "log_z_reference": forward.log_z, "log_z": None, "path_ess": None, "kl": None}
    tensors = {"samples": drawn.x}
    if model.row.trained:
        tensors["log_weights"] = log_w = reached + drawn.log_ratio.cpu()
        own = evidence(log_w)
        row |= {"log_z": own.log_z, "path_ess": own.ess, "kl": float(drawn.kl.mean())}
    return Found(verdict, row, base, log_forward, tensors)


def _seeing(judge: Callable[..., Tensor], judged: dict[str, Any]) -> Callable[..., Tensor]:
    """A judge that is told, besides the condition, what only judges see."""
    return lambda x, **condition: judge(x, **condition, **{k: v.expand(len(x), *v.shape[1:]) for k, v in judged.items()})


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _reference(found: Found, seed: int) -> Tensor:
    """Draws of the weighted base."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(normalised(found.log_forward), GRID, replacement=True, generator=generator)
    return found.base[chosen.to(found.base.device)]


def _blocks(
    model: Tilted, scores: list[Score], row: dict[str, Any], shown: dict[str, Tensor], ways: list[dict[str, Any]]
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    reward = scores[0]
    best = None if reward.reference is None else model.cost.strength * reward.reference - row["log_z_reference"]
    table = [reward._replace(name="mean reward"), *(s._replace(name=f"judge: {s.name}") for s in scores[1:])]
    table += [
        Score("log Z", None, row["log_z_reference"], row["log_z"]),
        Score("KL to the base", 0.0, best, row["kl"]),
        Score("effective sample size", None, row["reference_ess"], row["path_ess"]),
    ]
    levels = {"reward": {"before": reward.base, "reference": reward.reference}}
    caption = f"{SAME_NOISE} The reference follows the tilted law p_base · e^{{λr}} itself."
    pictures = gallery(shown, caption=caption if "After" in shown else "")
    blocks: list[Block] = [pictures, ways_table(ways), scores_table(table)]
    return blocks, training_blocks(model.history, TILTING, levels, model.chain.t.tolist())


def _notes(model: Tilted, how: Evaluation) -> list[str]:
    notes = [f"The exact tilt is {how.reference_samples} base samples weighted by exp(λ r): importance resampling."]
    if model.row.bias:
        notes.append(f"The method {model.row.name!r} does not reach that tilt: {model.row.bias}.")
    if ends_noiselessly(model.base, model.settings):
        notes.append(
            "Images are the noiseless last prediction of the base; path weights are exact for the law of that chain."
        )
    if len(how.cases) > 1:
        notes.append(
            f"Conditional: amortised over conditions and checked on {len(how.cases)} that training never saw; the table "
            "averages over them, the pictures show the first."
        )
    return notes
