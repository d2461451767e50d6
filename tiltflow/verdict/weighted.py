r"""Weighted samples, and what is said of them with errors that respect the weights.

A set of n rows with weights w, Σw = 1, is worth 1/Σw² independent draws. Means are Σ w f(x); their errors come from a
bootstrap of the rows with their weights (Poisson multiplicities), never from resampled rows taken as independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltflow.core.weights import normalised, systematic

RESAMPLES, ROWS, COLUMNS = 200, 4_000, 1_000
APART = 4
"""Effective draws for each row of a subset that is drawn without replacement: so thin a subset keeps the weights' law."""


@dataclass(frozen=True)
class Weighted:
    """Rows with log weights, and a generator for the bootstrap.

    Args:
        x: (n, d).
        log_w: (n,), unnormalised.
        generator: On the CPU.
    """

    x: Tensor
    log_w: Tensor
    generator: torch.Generator

    @cached_property
    def weight(self) -> Tensor:
        """(n,), of sum 1."""
        return normalised(self.log_w)

    @cached_property
    def size(self) -> float:
        """Effective number of draws, 1/Σw²."""
        return 1 / float(self.weight.square().sum())

    @cached_property
    def counts(self) -> Tensor:
        """Bootstrap multiplicities (RESAMPLES + 1, n); row 0 is the sample itself."""
        n = len(self.log_w)
        counts = torch.poisson(torch.ones(RESAMPLES, n, dtype=torch.float64), generator=self.generator)
        return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean of values (n,) or (n, m) in each resample, (RESAMPLES + 1, …)."""
        total = (self.counts @ self.weight).reshape(-1, *(1,) * (values.ndim - 1))
        return self.counts @ (self.weight.reshape(-1, *(1,) * (values.ndim - 1)) * values.double()) / total

    def plain_mean(self, values: Tensor) -> Tensor:
        """Mean of values (n,) without the weights, in the same resamples."""
        return self.counts @ values.double() / self.counts.sum(1)

    def shares(self, centres: Tensor) -> Tensor:
        """Shares of the cells that are nearest to each centre, in each resample."""
        nearest = torch.cdist(self.x.double(), centres).argmin(1)
        return self.mean(torch.nn.functional.one_hot(nearest, len(centres)))

    def diversity(self) -> tuple[float, float]:
        """Mean distance of two different draws, Σ_{i≠j} w_i w_j ‖x_i − x_j‖, and its standard error (first order)."""
        drawn = systematic(self.log_w, self.generator, min(ROWS, len(self.x)))
        columns = drawn[torch.randperm(len(drawn), generator=self.generator)[:COLUMNS]]
        other = (drawn[:, None] != columns).double()
        distance = torch.cdist(self.x[drawn].double(), self.x[columns].double())
        own = (other * distance).sum(1) / other.sum(1).clamp_min(1)
        spread = (own - own.mean()).square()
        error2 = 4 * float((self.weight[drawn] * spread).mean())
        subsets = float(spread.mean()) * (1 / len(drawn) + 1 / len(columns))
        return float(own.mean()), (error2 + subsets) ** 0.5

    def subset(self, n: int) -> Tensor:
        """n different rows, drawn by weight, (n, d)."""
        rows = torch.multinomial(self.weight, n, generator=self.generator)
        return self.x[rows].double()


def own_neighbours(mine: Weighted, reference: Weighted) -> tuple[float, float, int]:
    """Share of samples whose nearest neighbour is another of them, not one of as many draws of the reference.

    It is ½ for equal laws. A sampler that repeats or memorises has its own rows as neighbours. Returns the share, its
    standard error, and how many rows were compared. (Lopez-Paz and Oquab 2017, arXiv:1610.06545.)
    """
    n = min(COLUMNS, int(mine.size / APART), int(reference.size / APART))
    if n < 2:
        return float("nan"), float("nan"), n
    x, y = mine.subset(n), reference.subset(n)
    own = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).min(1).values
    other = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    share = float((own < other).double().mean() + 0.5 * (own == other).double().mean())
    return share, (0.5 / n) ** 0.5, n
