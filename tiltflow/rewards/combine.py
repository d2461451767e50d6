"""Several rewards as one, with every part at hand; and a reward that is averaged over small shifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

Score = Callable[[Tensor, list[str]], Tensor]
"""(images (n, 3, H, W) in [0, 1] or audio (n, channels, samples), texts) → (n,)."""


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """r = Σ w_i r_i of rewards ``(x (n, …), texts) -> (n,)`` under names; ``parts`` has them one by one, without weights.

    Raises:
        TiltflowError: no reward, or a weight that is 0 or not finite.
    """

    rewards: Mapping[str, tuple[Score, float]]

    def __post_init__(self) -> None:
        if not self.rewards:
            raise TiltflowError("a weighted sum needs at least one reward.")
        for name, (_, weight) in self.rewards.items():
            if weight == 0 or not math.isfinite(weight):
                raise TiltflowError(f"the weight of {name} is {weight}: leave it out, or give a finite number other than 0.")

    def parts(self, x: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """r_i, raw."""
        return {name: reward(x, texts) for name, (reward, _) in self.rewards.items()}

    def __call__(self, x: Tensor, texts: list[str]) -> Tensor:
        """Σ w_i r_i."""
        return sum((self.rewards[name][1] * value for name, value in self.parts(x, texts).items()), x.new_zeros(len(x)))


@dataclass(frozen=True, eq=False)
class Smoothed:
    """E[r(x + std·ε)] over ``draws`` Gaussian ε, the same for every call: a rough reward with a gradient that is not.

    Raises:
        TiltflowError: a standard deviation that is not positive, fewer than one draw.
    """

    reward: Score
    std: float
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.draws >= 1):
            raise TiltflowError(f"smoothing needs std > 0 and at least one draw, got {self.std} and {self.draws}.")

    def __call__(self, x: Tensor, texts: list[str]) -> Tensor:
        """The mean over the draws."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = (torch.randn(x.shape[1:], generator=generator).to(x) for _ in range(self.draws))
        return torch.stack([self.reward(x + self.std * e, texts) for e in noise]).mean(0)
