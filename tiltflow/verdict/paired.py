"""Before and after, in the same noise: the verdict on models that have no exact tilt to be held against."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tiltflow.verdict.line import REWARD, SIGMAS, Line, Status

KEPT, LOST = 0.8, 0.5
"""Shares of the base's diversity: at least the first is good, less than the second is bad."""
EFFECT = 0.05
"""The least rise of the reward, in standard deviations of the base's, that is one."""


class Judged(NamedTuple):
    """Samples x, their scores by name (n,), their paths' KL to the base (n,), and the mean distance of two of one prompt."""

    x: Tensor
    scores: dict[str, Tensor]
    kl: Tensor
    diversity: float


def against_base(before: Judged, after: Judged) -> list[Line]:
    """Lines for models that have no exact tilt to be held against: samples of base and fine-tuned model in the same noise.

    Did the reward rise, did the held-out judges not fall, is the diversity still there? Differences are paired.
    """
    lines = []
    for name in after.scores:
        change = after.scores[name] - before.scores[name]
        mean, error = float(change.mean()), float(change.std()) / len(change) ** 0.5
        low, high = mean - SIGMAS * error, mean + SIGMAS * error
        held_out = name != REWARD
        unclear: Status = "warn" if held_out and low <= 0 <= high else "cannot tell"  # NaN is in no interval
        status: Status = "pass" if low > 0 else "fail" if high < 0 else unclear
        said = "held out: must not fall while the reward rises" if held_out else "mean change, in the same noise"
        spread = float(before.scores[name].std())
        if status == "pass" and not held_out and mean < EFFECT * spread:
            status = "warn"
            said = f"no effect: {mean / spread:.1g} of the base's spread; raise λ, the learning rate or the rounds"
        lines.append(Line(f"held-out {name}" if held_out else name, mean, low, high, "> 0", status, said))
    ratio = after.diversity / before.diversity if before.diversity > 0 else float("nan")
    kept: Status = "cannot tell" if ratio != ratio else "pass" if ratio >= KEPT else "warn" if ratio >= LOST else "fail"
    said = "mean distance between samples of one prompt, over the base's"
    return [*lines, Line("diversity kept", ratio, None, None, f"≥ {KEPT:g} good, < {LOST:g} bad", kept, said)]
