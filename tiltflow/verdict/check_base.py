r"""Is a base what it is said to be? Answered from the network and a thousand of its own samples, before any training.

A table in the vocabulary of :mod:`tiltflow.verdict.check_reward`. The questions about one call of the network are those of
:mod:`tiltflow.verdict.base_probe`; whether it agrees with itself, and if not, which reading of it would, those of
:mod:`tiltflow.verdict.base_consistency`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.progress import Tell, silent
from tiltflow.train.method import Conditions
from tiltflow.verdict import base_consistency as consistent
from tiltflow.verdict import base_probe as probe
from tiltflow.verdict.base_consistency import Consistency
from tiltflow.verdict.questions import Question, Report, ask_all

MIN_SAMPLES, DOOR_STEPS = 200, 10
CALLED = ("output shape", "input unchanged")
STEADY = (*CALLED, "deterministic", "batch independent")
FINITE = ("finite at t = 0", "finite between")

QUESTIONS: tuple[Question, ...] = (
    Question("dtype", "that of x", (), probe.dtype),
    Question("evaluation mode", "0 modules", (), probe.evaluation_mode),
    Question("output shape", "that of x, for t (B,)", ("evaluation mode",), probe.shape),
    Question("input unchanged", "0 changed", ("output shape",), probe.unchanged),
    Question("deterministic", "≤ 1e-3 (float64: 1e-6)", ("output shape",), probe.deterministic),
    Question("batch independent", "≤ 1e-3 (float64: 1e-6)", ("deterministic",), probe.batch_independent),
    Question("conditions", "> 1e-6", ("output shape",), consistent.conditioned),
    Question("finite at t = 0", "0 bad", CALLED, probe.finite_start),
    Question("finite between", "0 bad", CALLED, probe.finite_between),
    Question("finite at t = 1", "0 bad", CALLED, probe.finite_end),
    Question("differentiable", "0 bad", CALLED, consistent.differentiable),
    Question("magnitude", ".05 … 20", FINITE, consistent.magnitude),
    Question(
        "consistency",
        f"≤ {consistent.CONSISTENT:g} good, > {consistent.INCONSISTENT:g} bad",
        (*STEADY, *FINITE),
        consistent.consistency,
    ),
    Question("direction of time", "as declared", (*STEADY, *FINITE), consistent.direction),
    Question("timesteps", "> 0.02", (*STEADY, *FINITE), consistent.timesteps),
    Question("predictor", "as declared", (*STEADY, *FINITE), consistent.predictor),
    Question("interpolant", "as declared", (*STEADY, *FINITE), consistent.interpolant),
    Question("output at t = 0", "≤ 0.1 good, > 0.5 bad", (*STEADY, *FINITE, "magnitude"), consistent.noise_output),
    Question("mean at t = 0", "≤ 0.2 good, > 0.5 bad", (*STEADY, *FINITE, "magnitude"), consistent.noise_end),
    Question(
        "chain marginals",
        f"≤ {consistent.MARGINALS[0]:g} good, > {consistent.MARGINALS[1]:g} bad",
        ("consistency",),
        consistent.marginals,
    ),
    Question("denoiser", f"≥ {consistent.SYMMETRIC:g}", (*FINITE, "magnitude", "differentiable"), consistent.denoiser),
)
"""In the order in which they are asked."""


class BaseReport(Report):
    """The ``lines`` of the check."""


def check_base(
    base: Process,
    *,
    generator: torch.Generator,
    samples: int = 1_000,
    conditions: Conditions | None = None,
    steps: int = 20,
    tell: Tell = silent,
) -> BaseReport:
    """Try a base process before anything is built on it.

    Args:
        base: as it would be fine-tuned; its buffers are left as they are. It is tried in the default dtype of torch, on the
            generator's device.
        generator: source samples, noise, conditions.
        samples: N ≥ 200 end points of its own ODE.
        conditions: draws a condition for each, ``(n, generator) -> {name: (n, …)}``.
        steps: of the ODE (Heun) and of the chain.
        tell: told what is going on, (what, done, total, note).

    Returns:
        One line per question. What the network raises becomes a failing line that names it, and what then cannot be asked a
        line "cannot tell". If the base agrees with itself as declared, no other reading is tried.

    Raises:
        TiltflowError: too few samples or steps.
    """
    if samples < MIN_SAMPLES or steps < 2:
        raise TiltflowError(f"a base is checked with at least {MIN_SAMPLES} samples and 2 steps; got {samples} and {steps}.")
    return _report(QUESTIONS, base, generator, samples, conditions, steps, tell)


def _report(
    questions: Iterable[Question],
    base: Process,
    generator: torch.Generator,
    samples: int,
    conditions: Conditions | None,
    steps: int,
    tell: Tell = silent,
) -> BaseReport:
    """The answers, with the base's buffers left as they were."""
    kept = {n: b.clone() for n, b in base.model.named_buffers()} if isinstance(base.model, nn.Module) else {}
    try:
        subject = Consistency(base, generator, samples, steps, conditions)
        return BaseReport(list(ask_all(questions, subject, lambda n: tell("questions", n, len(QUESTIONS), "")).values()))
    finally:
        if isinstance(base.model, nn.Module):
            with torch.no_grad():
                for name, buffer in base.model.named_buffers():
                    buffer.copy_(kept[name])


DOOR = (
    "evaluation mode", "output shape", "input unchanged", "deterministic", "batch independent", "finite at t = 0",
    "finite between", "finite at t = 1", "differentiable", "direction of time", "timesteps", "predictor", "interpolant",
)  # fmt: skip
"""Questions whose failure stops a run; the others are numbers that a run may go on with."""


def require_base(base: Process, generator: torch.Generator, conditions: Conditions | None = None) -> None:
    """The questions of :data:`DOOR`, at the door of a run, from few samples.

    Raises:
        TiltflowError: a question that the base fails.
    """
    asked = [question for question in QUESTIONS if question.name in DOOR]
    for line in _report(asked, base, generator, MIN_SAMPLES, conditions, DOOR_STEPS).lines:
        if line.status == "fail":
            raise TiltflowError(f"the base, {line.name}: {line.explanation}. All checks: tiltflow check-base.")


def starts_at_base(
    base: Process, tuned: Process, generator: torch.Generator, conditions: Conditions | None = None, n: int = 30
) -> float:
    """Largest difference of X̂_1 between ``tuned`` and ``base``, relative to the base's, at n samples and times in [0, 1).

    0 for a copy and for a correction whose last layer is zero; a fine-tuning that starts elsewhere has another prior than
    the base it is said to tilt. Infinite if either is NaN. Trained modules should be in evaluation mode.
    """
    x = base.source(n, generator, torch.get_default_dtype(), generator.device)
    t = torch.arange(n).to(x) / n
    return consistent.starts_at(base, tuned, x, t, dict(conditions(n, generator)) if conditions else {})
