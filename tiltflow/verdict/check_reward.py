r"""Is a reward fit to tilt with, and by how much? Answered from samples of the base alone, before any training.

:func:`check_reward` writes a report, :func:`quick_check` stands at the door of a run and stops a reward that is not.

Two tables: the questions of :mod:`tiltflow.verdict.probe`, each with its number, threshold and answer, and what
:mod:`tiltflow.verdict.strength` predicts of each λ by weighting the samples with e^{λr}.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.core.cost import Reward
from tiltflow.core.errors import TiltflowError, TiltflowWarning
from tiltflow.verdict.probe import QUESTIONS, Probe
from tiltflow.verdict.questions import Answer, Report, answered, ask_all, untried
from tiltflow.verdict.strength import StrengthRow, largest_strength, predict_tilt

MIN_ESS = 0.05
LADDER = (0.125, 0.25, 0.5, 1.0, 2.0)
MIN_SAMPLES = 100


@dataclass(frozen=True)
class RewardReport(Report):
    """``lines`` of the check; ``strengths`` by rising λ from the base's λ = 0; the ``suggestion``, None if there is none."""

    strengths: list[StrengthRow]
    suggestion: float | None


class HasShape(Protocol):
    """A process, or anything else that says what one sample looks like."""

    @property
    def event_shape(self) -> tuple[int, ...]: ...


def check_reward(
    base: HasShape,
    reward: Reward,
    *,
    samples: Tensor,
    generator: torch.Generator,
    strengths: Iterable[float] = (),
    judge: Reward | None = None,
    **condition: Any,
) -> RewardReport:
    """Try ``reward`` on samples of the base, and predict what each strength would do.

    Args:
        base: the process to be tilted; reward: ``(x (B, *event), **condition) -> (B,)``.
        samples: (N, *event) of the base, N ≥ 100. The table of strengths is as good as N·ESS is large.
        generator: random directions and orders.
        strengths: λs to tabulate, beside λ = 0 and a geometric ladder about the suggestion.
        judge: a held-out score ``(x, **condition) -> (B,)``, whose mean under each tilt is predicted too.
        condition: passed on to both. Of a tensor with rows only the first is used, for every sample: the report is
            about that one condition.

    Returns:
        One line per question. What the reward raises becomes a failing line that names it, and what then cannot be asked
        a line "cannot tell". No table if the values are unusable. The suggestion is the largest λ with ESS ≥ 5 %.

    Raises:
        TiltflowError: samples too few, not finite or not of the base's shape; a negative or infinite strength.
    """
    wanted = {0.0, *(float(s) for s in strengths)}
    _refuse(base, samples, wanted)
    probe = Probe(reward, samples.detach(), condition, generator)
    lines = ask_all(QUESTIONS, probe)
    if lines["varies"].status != "pass":
        lines["strength"] = untried("strength", f"ESS ≥ {MIN_ESS:.0%}", "varies")
        return RewardReport(list(lines.values()), [], None)

    judged: list[Tensor] = []
    if judge is not None:
        held_out = Probe(judge, probe.x, condition, generator)
        lines["judge"] = answered("judge", "(B,), finite", partial(_judge, held_out, judged))
    rewards = probe.values
    suggestion = largest_strength(rewards, MIN_ESS)
    lines["strength"] = answered("strength", f"ESS ≥ {MIN_ESS:.0%}", partial(_strength, len(rewards), suggestion))
    centre = suggestion or 1 / float(rewards.std())
    ladder = sorted(wanted | {centre * factor for factor in LADDER})
    table = [predict_tilt(rewards, s, judged[0] if judged else None) for s in ladder]
    return RewardReport(list(lines.values()), table, suggestion)


DOOR = ("output shape", "output length", "dtype", "finite value", "deterministic", "batch independent", "varies")
GRADIENT = ("differentiable", "input unchanged", "finite gradient", "gradient norm")


def quick_check(
    reward: Reward, x: Tensor, generator: torch.Generator, needs_gradient: bool, otherwise: str = "", **condition: Any
) -> None:
    """Stop a reward that no run can use, from a few samples: some twenty calls on at most ``len(x)`` rows.

    Args:
        reward: ``(x (B, *event), **condition) -> (B,)``; x: (n, *event), about 8 to 32 samples; generator: an order of them.
        needs_gradient: the method follows ∇r; without it a detached or piecewise constant reward is fine.
        otherwise: what else could be done with a reward that has no gradient.
        condition: passed on; of a tensor with rows the first, for every sample.

    Raises:
        TiltflowError: the reward raised, has the wrong shape or type, is NaN or infinite, not deterministic, mixes the rows
            of its batch, or is constant; and where the gradient is needed, detached, changed behind autograd's back, NaN or
            infinite, or zero at every sample (a sign, a count, a threshold).
    """
    if len(x) < 2 or not bool(torch.isfinite(x).all()):
        raise TiltflowError(f"a reward is tried on at least 2 finite samples; got {tuple(x.shape)}, or some are not finite.")
    probe = Probe(reward, x.detach(), condition, generator)
    wanted = DOOR + (GRADIENT if needs_gradient else ())
    called = getattr(reward, "__name__", type(reward).__name__)
    for name, line in ask_all([q for q in QUESTIONS if q.name in wanted], probe).items():
        if line.status == "fail":
            advice = f"; {otherwise}" if otherwise and name in ("differentiable", "gradient norm") else ""
            raise TiltflowError(f"reward {called!r}, {name}: {line.explanation}{advice}.")
        if name == "deterministic" and line.status == "warn":
            warnings.warn(
                f"reward {called!r} gives other values when it is asked again: if it keeps something between calls, a run "
                "that is interrupted and resumed will not equal one that is not.", TiltflowWarning, stacklevel=2,
            )  # fmt: skip


def _refuse(base: HasShape, samples: Tensor, strengths: Iterable[float]) -> None:
    if samples.shape[1:] != base.event_shape or len(samples) < MIN_SAMPLES:
        raise TiltflowError(
            f"samples have shape {tuple(samples.shape)}; a check needs at least {MIN_SAMPLES} samples of the base, "
            f"(N, {', '.join(map(str, base.event_shape))})."
        )
    if not bool(torch.isfinite(samples).all()):
        raise TiltflowError("the base's samples are not finite: mend the base before its reward.")
    bad = [s for s in strengths if not 0 <= s < math.inf]
    if bad:
        raise TiltflowError(
            f"strengths must be finite and at least 0, got {bad}. To lower a reward instead of raising it, negate the "
            "reward."
        )


def _judge(probe: Probe, judged: list[Tensor]) -> Answer:
    scores = probe.values
    bad = int((~torch.isfinite(scores)).sum())
    if scores.shape != (len(probe.x),) or bad:
        return bad, "fail", f"returned shape {tuple(scores.shape)} for {len(probe.x)} samples, {bad} of them not finite"
    judged.append(scores)
    return float(scores.mean()), "pass", "mean of the held-out score on the base's samples"


def _strength(n: int, suggestion: float | None) -> Answer:
    if suggestion is None:
        share = f"{MIN_ESS:.0%} of the samples or more share the highest reward"
        return None, "warn", f"ESS sets no limit to λ: {share}"
    text = f"the largest λ that leaves {MIN_ESS * n:.0f} effective samples of {n}"
    few = MIN_ESS * n < 50
    return suggestion, "warn" if few else "pass", text + ("; give more samples, the table is rough" if few else "")
