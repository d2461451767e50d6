r"""When does more training not help? Judged from rounds that are paid for already.

The paths of a round bound log Z from below by E[log w] ("elbo"), short of it by KL(P_u ‖ P*): what training lowers. Once its
mean over the last quarter of the rounds is no higher than over the quarter before, by more than a tolerance and by more than
half a standard error, a quarter as many rounds follow, in which the learning rate falls, and training ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

FEWEST = 40
"""Rounds before the first judgement."""
EARLIEST = FEWEST + FEWEST // 4
"""Rounds of a training that ends as early as it may."""
History = Sequence[Mapping[str, Any]]


def rise(values: Sequence[float]) -> tuple[float, float]:
    """What the last quarter of the values has over the quarter before, with its standard error."""
    w = len(values) // 4
    last, before = values[-w:], values[-2 * w : -w]
    return fmean(last) - fmean(before), math.sqrt((variance(last) + variance(before)) / w)


def settled(history: History, tolerance: float) -> bool:
    """Whether the bound has stopped rising."""
    bounds = [row["elbo"] for row in history if "elbo" in row]
    if len(bounds) < FEWEST:
        return False
    risen, error = rise(bounds)
    return risen < max(tolerance, error / 2)


def until(history: History, tolerance: float | None, minutes: float | None) -> int | None:
    """How many rounds there will be in all; None: more of them help as yet.

    Args:
        history: Rows of all rounds so far.
        tolerance: In nats; None: no criterion.
        minutes: Of training at most; None: no bound.
    """
    spent = sum(row["seconds"] for row in history) / 60
    if (tolerance is not None and settled(history, tolerance)) or (minutes is not None and spent > 0.8 * minutes):
        return len(history) + len(history) // 4
    return None


def resumed(history: History, rounds: int) -> int | None:
    """What was found before a training was interrupted; all its rounds, if it had ended and is now given more of them."""
    if not history or (found := history[-1].get("until")) is None:
        return None
    return rounds if len(history) >= found and history[-1]["at_most"] < rounds else int(found)
