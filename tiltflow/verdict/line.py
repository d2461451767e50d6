r"""One question of a verdict, its answer, and how answers add up.

Every line has an estimate, an interval of about three standard errors, two thresholds (good ≤ bad) and one of four answers:

    pass          estimate ≤ good and the whole interval ≤ bad
    warn          the whole interval ≤ bad
    fail          the whole interval > bad
    cannot tell   the interval straddles: more samples, or a smaller strength, are needed

The worst line answers: fail, else cannot tell, else warn, else pass. Where a model can be sampled in several ways, each way
has lines of its own beside those that all ways share, and an answer; the verdict is the best of them, and names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Status = Literal["pass", "warn", "fail", "cannot tell"]


STATUSES: tuple[Status, ...] = get_args(Status)
SEVERITY: tuple[Status, ...] = ("pass", "warn", "cannot tell", "fail")

SIGMAS = 3.0
REWARD = "reward"
"""The name of the score that is trained on; all others are held out."""
AS_DRAWN, BY_ODE, EXACT = "as drawn", "ode", "exact"
"""Ways of sampling: by the chain, by the ODE, and by the chain's paths under their path weights."""


class Line(NamedTuple):
    """One question of the verdict: its number, the interval it is known to, the threshold, and the answer."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    threshold: str
    status: Status
    explanation: str
    way: str = ""
    """The way of sampling that it is about; empty: all."""


class Score(NamedTuple):
    """The mean of one quantity under the base, under the target (the reference), and as the sampler reached it: as drawn,
    and in other ways of sampling, where there are any."""

    name: str
    base: float | None
    reference: float | None
    reached: float | None
    ode: float | None = None
    exact: float | None = None


class Verdict(NamedTuple):
    """The answer, its lines, the scores that were compared, and each way of sampling with its answer, the best first."""

    status: Status
    lines: list[Line]
    scores: list[Score] = []  # noqa: RUF012 - a NamedTuple's default is never changed
    ways: Mapping[str, Status] = {}

    @property
    def way(self) -> str:
        """The way of sampling that answers; empty if there are none."""
        return next(iter(self.ways), "")

    @property
    def deciding(self) -> list[Line]:
        """The lines that it answers by."""
        return [line for line in self.lines if line.way in ("", self.way)]


def overall(lines: list[Line]) -> Status:
    """The worst answer: fail, then cannot tell, then warn, then pass."""
    return max((line.status for line in lines), key=SEVERITY.index, default="pass")


def best_way(lines: list[Line], scores: list[Score]) -> Verdict:
    """The verdict on a model that can be sampled in several ways: the best of their answers, of equal ones the first."""
    ways = dict.fromkeys(line.way for line in lines if line.way)
    answers = {way: overall([line for line in lines if line.way in ("", way)]) for way in ways}
    ordered = dict(sorted(answers.items(), key=lambda pair: SEVERITY.index(pair[1])))
    return Verdict(next(iter(ordered.values())), lines, scores, ordered)


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
