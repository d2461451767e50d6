r"""Distances between sample sets, each to be read beside its floor: the same number between two reference sets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError


def w2(x: Tensor, y: Tensor) -> float:
    r"""Exact 2-Wasserstein distance of two equal-size sets, (min_π 1/n Σ‖x_i − y_π(i)‖²)^½, by assignment (SciPy).

    x, y: (n, d) or (n, *event). Raises TiltflowError if the shapes differ or SciPy is missing.
    """
    if x.shape != y.shape:
        raise TiltflowError(f"w2 needs two sets of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise TiltflowError("w2 needs SciPy: pip install 'tiltflow[report]'.") from error
    exact = "donot_use_mm_for_euclid_dist"
    cost = torch.cdist(double(x.flatten(1)), double(y.flatten(1)), compute_mode=exact).square().numpy()
    reduced = cost - cost.min(1, keepdims=True)  # the same optimal assignment, found in less than half the time
    rows, columns = linear_sum_assignment(reduced - reduced.min(0, keepdims=True))
    return float(cost[rows, columns].mean() ** 0.5)


def mean_w2(x: Tensor, y: Tensor, n: int, draws: int, generator: torch.Generator) -> float:
    """Mean of :func:`w2` over ``draws`` pairs of random subsets of n rows each."""
    pairs = []
    for _ in range(draws):
        i = torch.randperm(len(x), generator=generator)[:n]
        j = torch.randperm(len(y), generator=generator)[:n]
        pairs.append((x[i], y[j]))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the assignment releases the interpreter lock
        return sum(pool.map(lambda pair: w2(*pair), pairs)) / draws


def pairwise_mean(x: Tensor, identity: Tensor | None = None) -> tuple[float, float]:
    """Diversity: the mean distance of two different rows of x (n, d), and its standard error (U-statistic).

    ``identity`` (n,) marks rows that are copies of one draw; pairs of copies do not count.
    """
    distance = torch.cdist(double(x.flatten(1)), double(x.flatten(1)))
    who = torch.arange(len(x)) if identity is None else identity
    pair = (who[:, None] != who).double()
    mean = float((pair * distance).sum() / pair.sum())
    rows = (pair * distance).sum(1) / pair.sum(1).clamp_min(1)
    return mean, 2 * float(rows.std()) / len(x) ** 0.5


def total_variation(p: Tensor, q: Tensor) -> float:
    """½ Σ|p_i − q_i| of two weight vectors."""
    return 0.5 * float((double(p) - double(q)).abs().sum())
