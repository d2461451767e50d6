"""How to train: what every job's settings extend."""

from __future__ import annotations

import math
from typing import Annotated

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, Positive, Range, Share, Whole, settings

Decay = Annotated[float, Range(0, 1 - 1e-9)]


@settings
class Training:
    """How :func:`tiltflow.train.fit.fit` trains.

    Args:
        rounds: Rounds of simulation, each followed by gradient steps; at most, where there is a tolerance.
        tolerance: Nats that the bound E[log w] must rise by, over a quarter of the rounds, for training to go on; none: all
            rounds.
        minutes: Minutes of training at most; none: no bound.
        gradient_steps: Gradient steps per round.
        minibatch: Rows of a gradient step; none: all that the buffer holds.
        buffer_rounds: Rounds whose rows are kept and drawn from.
        learning_rate: Adam's learning rate.
        final_learning_rate: Share of the learning rate that is left at the end of its cosine decay; 1: constant.
        warmup: Rounds of linear warm-up.
        betas: Adam's decay rates.
        gradient_clip: Bound on the norm of a gradient step; none: no bound.
        ema: Decay of the averaged weights, which are the result; 0: none.
        accumulate: Rows that the loss sees at a time, to save memory; the gradient is that of all rows.
        checkpoint_every: Rounds between checkpoints.
    """

    rounds: Count = 200
    tolerance: Positive | None = None
    minutes: Positive | None = None
    gradient_steps: Count = 1
    minibatch: Count | None = None
    buffer_rounds: Count = 1
    learning_rate: Positive = 1e-3
    final_learning_rate: Share = 0.01
    warmup: Whole = 0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    gradient_clip: Positive | None = 1.0
    ema: Decay = 0.97
    accumulate: Count | None = None
    checkpoint_every: Count = 25

    @property
    def open_ended(self) -> bool:
        """Whether training may end before its last round."""
        return self.tolerance is not None or self.minutes is not None

    def rate(self, iteration: int, until: int | None = None) -> float:
        """Learning rate of a round: a cosine over all rounds; of an open-ended training, over its last fifth."""
        low, end = self.final_learning_rate, min(self.rounds, until or self.rounds)
        start = end - end // 5 if self.open_ended else 0
        share = max(iteration - start, 0) / max(end - start, 1)
        ramp = min(1.0, (iteration + 1) / (self.warmup + 1))
        return self.learning_rate * ramp * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def check_regressed(last_steps: int | None, random_steps: int | None, steps: int) -> None:
    """Raise TiltflowError for numbers of steps to regress on that exclude each other, or that ``steps`` do not hold."""
    if random_steps is not None and last_steps is None:
        raise TiltflowError("random_steps are drawn beside the last ones: give last_steps as well.")
    if last_steps is not None and not 1 <= last_steps + (random_steps or 0) <= steps:
        raise TiltflowError(
            f"last_steps + random_steps must be from 1 to steps = {steps}, got {last_steps + (random_steps or 0)}."
        )
