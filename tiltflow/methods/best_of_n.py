r"""Best of N: draw N, keep the one with the highest reward.

    p_N(x) = N F(r(x))^{N−1} p(x),      KL(p_N ‖ p) = log N − (N−1)/N

with F the distribution function of r under p (continuous rewards; with ties the right side is an upper bound). That is not
p·e^{λr} for any λ: biased by construction, and λ plays no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tiltflow.core.chain import Chain
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import walk
from tiltflow.train.method import TrainingFree, Weighted


@dataclass(frozen=True)
class BestOfN(TrainingFree):
    """Needs reward values only. The weights it returns are zeros and there is no log Z.

    Args:
        chain: what to draw from, with or without a control.
        cost: the lowest g = −λr is kept.
        candidates: N, draws per sample kept.

    Raises:
        TiltflowError: fewer than one candidate.
    """

    chain: Chain
    cost: Cost
    candidates: int = 4

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise TiltflowError(f"best of N needs at least one candidate per sample, not {self.candidates}.")

    @property
    def kl(self) -> float:
        """KL(p_N ‖ p) to the law drawn from."""
        return math.log(self.candidates) - (self.candidates - 1) / self.candidates

    @torch.no_grad()
    def sample(self, control: Control | None, n: int, generator: torch.Generator, **condition: Any) -> Weighted:
        """n samples, (n, *event), from N batches of n walks; candidates of a sample share its condition row."""
        best = lowest = None
        for _ in range(self.candidates):
            x = self.chain.source(n, generator)
            for step in walk(self.chain, control, x, generator, **condition):
                x = step.x_next
            cost = self.cost.value(x, **condition)
            if best is None or lowest is None:
                best, lowest = x, cost
            else:
                better = cost < lowest
                best = torch.where(better.reshape(-1, *(1,) * (x.ndim - 1)), x, best)
                lowest = torch.where(better, cost, lowest)
        assert best is not None
        return Weighted(best, best.new_zeros(n), None)
