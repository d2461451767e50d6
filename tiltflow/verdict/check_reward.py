r"""Is a reward fit to tilt with, and by how much? Answered from samples of the base alone, before any training.

Two tables: the questions of :mod:`tiltflow.verdict.probe`, each with its number, threshold and answer, and what
:mod:`tiltflow.verdict.strength` predicts of each λ by weighting the samples with e^{λr}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.core.cost import Reward
from tiltflow.core.errors import TiltflowError
from tiltflow.verdict.line import Line, Status, overall
from tiltflow.verdict.probe import QUESTIONS, Answer, Probe
from tiltflow.verdict.strength import StrengthRow, largest_strength, predict_tilt

MIN_ESS = 0.05
LADDER = (0.125, 0.25, 0.5, 1.0, 2.0)
MIN_SAMPLES = 100


@dataclass(frozen=True)
class RewardReport:
    """``lines`` of the check; ``strengths`` by rising λ from the base's λ = 0; the ``suggestion``, None if there is none."""

    lines: list[Line]
    strengths: list[StrengthRow]
    suggestion: float | None

    @property
    def status(self) -> Status:
        """The worst line: fail, then cannot tell, then warn, then pass."""
        return overall(self.lines)


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
    lines: dict[str, Line] = {}
    for name, threshold, needs, ask in QUESTIONS:
        missing = next((n for n in needs if lines[n].status in ("fail", "cannot tell")), None)
        lines[name] = _untried(name, threshold, missing) if missing else _line(name, threshold, partial(ask, probe))
    if lines["varies"].status != "pass":
        lines["strength"] = _untried("strength", f"ESS ≥ {MIN_ESS:.0%}", "varies")
        return RewardReport(list(lines.values()), [], None)

    judged: list[Tensor] = []
    if judge is not None:
        held_out = Probe(judge, probe.x, condition, generator)
        lines["judge"] = _line("judge", "(B,), finite", partial(_judge, held_out, judged))
    rewards = probe.values
    suggestion = largest_strength(rewards, MIN_ESS)
    lines["strength"] = _line("strength", f"ESS ≥ {MIN_ESS:.0%}", partial(_strength, len(rewards), suggestion))
    centre = suggestion or 1 / float(rewards.std())
    ladder = sorted(wanted | {centre * factor for factor in LADDER})
    table = [predict_tilt(rewards, s, judged[0] if judged else None) for s in ladder]
    return RewardReport(list(lines.values()), table, suggestion)


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


def _line(name: str, threshold: str, ask: Callable[[], Answer]) -> Line:
    """The line of an answer; an exception is the answer "fail" under its own name."""
    try:
        value, status, text = ask()
    except Exception as error:
        value, status, text = None, "fail", f"it raised {type(error).__name__}: {error}"
    return Line(name, value, None, None, threshold, status, text)


def _untried(name: str, threshold: str, missing: str) -> Line:
    return Line(name, None, None, None, threshold, "cannot tell", f"not tried: see {missing!r}")


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
