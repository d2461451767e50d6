r"""One question of a verdict, its answer, and how answers add up.

Every line has an estimate, an interval of about three standard errors, two thresholds (good ≤ bad) and one of four answers:

    pass          estimate ≤ good and the whole interval ≤ bad
    warn          the whole interval ≤ bad
    fail          the whole interval > bad
    cannot tell   the interval straddles: more samples, or a smaller strength, are needed

A verdict fails if any line fails, else cannot tell if any cannot, else warns if any warns, else passes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Status = Literal["pass", "warn", "fail", "cannot tell"]


STATUSES: tuple[Status, ...] = get_args(Status)


SIGMAS = 3.0
REWARD = "reward"
"""The name of the score that is trained on; all others are held out."""


class Line(NamedTuple):
    """One question of the verdict: its number, the interval it is known to, the threshold, and the answer."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    threshold: str
    status: Status
    explanation: str


class Score(NamedTuple):
    """The mean of one quantity under the base, under the target (the reference), and as the sampler reached it."""

    name: str
    base: float | None
    reference: float | None
    reached: float | None


class Verdict(NamedTuple):
    """The answer, its lines, and the scores that were compared."""

    status: Status
    lines: list[Line]
    scores: list[Score] = []  # noqa: RUF012 - a NamedTuple's default is never changed


def overall(lines: list[Line]) -> Status:
    """The worst answer: fail, then cannot tell, then warn, then pass."""
    return max((line.status for line in lines), key=("pass", "warn", "cannot tell", "fail").index, default="pass")


def graded(name: str, value: float, error: float, good: float, bad: float, explanation: str) -> Line:
    """A line for a distance that should be 0: ``value`` with standard error ``error``."""
    low, high = max(value - SIGMAS * error, 0.0), value + SIGMAS * error
    if not (value == value and error == error):
        status: Status = "cannot tell"
    elif low > bad:
        status = "fail"
    elif high > bad:
        status = "cannot tell"
    else:
        status = "pass" if value <= good else "warn"
    return Line(name, value, low, high, f"≤ {good:g} good, > {bad:g} bad", status, explanation)
