r"""Do two sample sets fill the same regions? What a distance averages away, a lost tail or a lost mode, is seen here.

Regions are the tails of every feature at thirteen shares from ½ % to 99½ %, and the neighbourhoods of 64 points far apart,
five sizes of each. In each the shares p and q of the two sets are compared,

    z = (p − q) / √(v_p + v_q),     v ≥ δ · p̄(1 − p̄)/n,

where rows are related within groups and v is the variance over groups (Liang & Zeger 1986); δ ≥ 1, the design effect, is
what the variance over groups comes to, in units of that of independent rows, in nine tenths of the regions. With R regions
the largest |z| is held against the level 1 % / R of Student's t (Bonferroni), so that two sets of one law are found to be
apart once in a hundred times at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
BALLS, NEAREST, CENTRES, LEVEL, FEWEST = 64, (0.01, 0.02, 0.05, 0.1, 0.25), 2_000, 0.01, 5.0
"""Neighbourhoods, and their shares of all rows; rows that their centres are drawn from; level of the test; effective rows
that a region must be worth."""


class Sample(NamedTuple):
    """features (n, F), and groups (n,) of related rows (None: rows are independent)."""

    features: Tensor
    groups: Tensor | None = None


class Apart(NamedTuple):
    """How far apart two sets are.

    Args:
        gap: p − q in the region that is furthest apart, in standard errors; its ``error``.
        score: |z| there, over its limit: above 1 the sets are apart.
        region: What it is: a feature's name with its side, or a neighbourhood.
        share: q there.
        lost: The largest q of the regions that are apart and where p < q/2; 0 if there are none.
        seen: The smallest share that would be found if a set lost it whole.
    """

    gap: float
    error: float
    score: float
    region: str
    share: float
    lost: float
    seen: float


def apart(x: Sample, y: Sample, names: list[str], generator: torch.Generator) -> Apart:
    """Compare x with y.

    Args:
        x: The set that is judged, shares p.
        y: The one that it is held against, shares q.
        names: Of the features, F.
        generator: Of the neighbourhoods' centres, on the CPU.

    Raises:
        TiltflowError: a set with fewer than two groups.
    """
    regions, words = _regions(x.features, y.features, names, generator)
    n, m = len(x.features), len(y.features)
    (p, v, design), (q, w, other) = (
        _shares(part, s.groups) for part, s in zip(regions.split([n, m], 1), (x, y), strict=True)
    )
    pooled = (n * p + m * q) / (n + m)
    binomial = pooled * (1 - pooled)
    least = 1 / (design / n + other / m)
    v, w = torch.maximum(v, design * binomial / n), torch.maximum(w, other * binomial / m)
    few = [float("inf") if s.groups is None else len(s.groups.unique()) - 1 for s in (x, y)]
    freedom = (v + w).square() / (v.square() / few[0] + w.square() / few[1]).clamp_min(1e-300)
    limit = _limit(freedom.clamp(1, 1e6), LEVEL / len(words))
    error = (v + w).sqrt().clamp_min(1e-300)
    score = ((p - q).abs() / error / limit).masked_fill(binomial * least < FEWEST, 0.0)
    at = int(score.argmax())
    lost = q[(score > 1) & (p < q / 2)]
    hardest = float(limit.median()) ** 2
    return Apart(
        float((p - q)[at]), float(error[at]), float(score[at]), words[at], float(q[at]),
        float(lost.max()) if len(lost) else 0.0, hardest / (hardest + least),
    )  # fmt: skip


def _regions(x: Tensor, y: Tensor, names: list[str], generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """(R, n + m), which rows are in each region, and what it is."""
    both = double(torch.cat([x, y]))
    order = both.sort(0).values
    found, words = [], []
    for share in SHARES:
        edge = order[min(len(both) - 1, int(share * len(both)))]
        found.append(((both <= edge) if share <= 0.5 else (both > edge)).T)
        words += [f"{name} {'≤' if share <= 0.5 else '>'} {value:.4g}" for name, value in zip(names, edge.tolist())]
    rows = both[torch.randperm(len(both), generator=generator)[:CENTRES]]
    centre, spread = rows.median(0).values, (rows.quantile(0.75, 0) - rows.quantile(0.25, 0)).clamp_min(1e-12)
    rows, points = (((v - centre) / spread).clamp(-10, 10) for v in (rows, both))
    centres = _far_apart(rows, min(BALLS, len(rows)), generator)
    distance, radius = torch.cdist(centres, points), torch.cdist(centres, rows).sort(1).values
    for share in NEAREST:
        found.append(distance <= radius[:, int(share * len(rows))][:, None])
        words += [f"the nearest {share:.0%} of all rows to point {i + 1}" for i in range(len(distance))]
    return torch.cat(found), words


def _far_apart(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rows, as k-means++ draws them."""
    means = rows[:1]
    nearest = torch.cdist(rows, means)[:, 0].square()
    for _ in range(n - 1):
        new = rows[torch.multinomial(nearest + 1e-12, 1, generator=generator)]
        nearest = torch.minimum(nearest, torch.cdist(rows, new)[:, 0].square())
        means = torch.cat([means, new])
    return means


def _shares(inside: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Shares (R,) of rows inside, their variances, and the design effect."""
    n, share = inside.shape[1], inside.double().mean(1)
    binomial = share * (1 - share) / n
    if groups is None:
        return share, binomial, 1.0
    names, which = groups.unique(return_inverse=True)
    if len(names) < 2:
        raise TiltflowError("an error over groups of related rows needs at least two groups.")
    sums = torch.zeros(len(inside), len(names), dtype=torch.float64).index_add_(1, which, inside.double())
    counts = torch.bincount(which).double()
    variance = (sums - share[:, None] * counts).square().sum(1) / n**2 * len(names) / (len(names) - 1)
    sure = binomial * n >= 0.005
    design = (variance[sure] / binomial[sure]).quantile(0.9) if bool(sure.any()) else torch.ones(())
    return share, variance, max(1.0, float(design))


def _limit(freedom: Tensor, level: float) -> Tensor:
    """|t| that is exceeded with probability ``level``, for so many degrees of freedom."""
    from scipy.stats import t

    return torch.as_tensor(t.isf(level / 2, freedom.numpy()))
