r"""Path weights: how far a finished sampler is from its target, and the correction.

Two kinds, both from the quantities that :func:`tiltflow.core.simulate.sample` accumulates:

    chain    log w = −g(x_K) − Σ h f + log dP_base/dP_u                      targets p_base^chain · e^{−g}
    kernel   log w = log p̃*(x_K) + Σ log q(x_k|x_{k+1}) − log p_0 − Σ log N   targets p̃*, for any K and any control

The first is always available; against the true p_base it keeps the chain's O(1/K) bias. The second needs p̃* ∝ p*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.device import companion, double
from tiltflow.core.errors import TiltflowError

OVERSAMPLED, MOST = 4, 64
"""Weighted rows for each exact draw at first, and how many times as many at most."""


def log_mean_exp(log_w: Tensor) -> float:
    """log Ẑ = log mean w."""
    return float(torch.logsumexp(double(log_w), 0)) - math.log(len(log_w))


def ess(log_w: Tensor) -> float:
    """Effective sample size as a fraction, (Σw)²/(N Σw²), in (0, 1].

    >>> round(ess(torch.zeros(10)), 6)
    1.0
    """
    log_w = double(log_w)
    return math.exp(float(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0))) / len(log_w)


def normalised(log_w: Tensor) -> Tensor:
    """Weights that sum to 1 (float64, on the CPU)."""
    return torch.softmax(double(log_w), 0)


def tempered(log_w: Tensor, minimum_ess: float = 0.5) -> Tensor:
    """:func:`normalised` weights ∝ w^τ with the largest τ ≤ 1 whose ESS fraction is at least ``minimum_ess`` (bisection)."""
    low, high, log_w = 0.0, 1.0, log_w.cpu()
    if ess(log_w) < minimum_ess:
        for _ in range(30):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if ess(middle * log_w) >= minimum_ess else (low, middle)
        return normalised(low * log_w)
    return normalised(log_w)


class Evidence(NamedTuple):
    """What a set of path weights says: log Ẑ with its standard error, ESS fraction, and the lower bound E[log w]."""

    log_z: float
    log_z_error: float
    ess: float
    elbo: float


def evidence(log_w: Tensor) -> Evidence:
    """log Ẑ (delta-method standard error), ESS and ELBO of log weights (N,)."""
    fraction = ess(log_w)
    error = math.sqrt(max(1 / fraction - 1, 0.0) / len(log_w))
    return Evidence(log_mean_exp(log_w), error, fraction, float(double(log_w).mean()))


def truncated(log_w: Tensor) -> Tensor:
    """Weights of at most √N times their mean: all of them, unless a few carry the rest (Ionides 2008, JCGS 17(2))."""
    return double(log_w).clamp_max(log_mean_exp(log_w) + 0.5 * math.log(len(log_w)))


def pareto_k(log_w: Tensor) -> float:
    r"""Shape k̂ of the generalised Pareto law that the largest weights follow: their means of order 1/k̂ are finite.

    Above .7 the mean of these weights, and so log Ẑ and its error, is not to be trusted from any number of them that can be
    had (Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR 25(72)). The fit to the min(N/5, 3√N) largest is Zhang & Stephens'
    (2009, Technometrics 51(3)), drawn towards ½ by ten weights' worth. NaN for fewer than 25 weights; −1 for equal ones.
    """
    n = len(log_w)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    if tail < 5:
        return math.nan
    ordered = double(log_w).sort().values
    w = (ordered[-tail - 1 :] - ordered[-1]).exp()
    x = w[1:] - w[0]
    if not float(x[-1]) > 1e-12:
        return -1.0
    grid = 30 + int(math.sqrt(tail))
    steps = 1 - (grid / (torch.arange(grid, dtype=torch.float64) + 0.5)).sqrt()
    quartile = max(float(x[int(tail / 4 + 0.5) - 1]), 1e-300)
    theta = 1 / x[-1] + steps / (3 * quartile)
    shape = torch.log1p(-theta[:, None] * x).mean(1)
    profile = tail * ((-theta / shape).log() - shape - 1)
    mean = float((torch.softmax(profile.nan_to_num(-math.inf), 0) * theta).sum())
    k = float(torch.log1p(-mean * x).mean())
    return (tail * k + 5) / (tail + 10)


def systematic(log_w: Tensor, generator: torch.Generator, n: int | None = None) -> Tensor:
    """Rows (on the CPU) of n (None: N) draws ∝ w, systematic: a row of weight w is drawn ⌊nw⌋ or ⌈nw⌉ times, in order."""
    n = len(log_w) if n is None else n
    start = torch.rand((), generator=companion(generator, torch.device("cpu")), dtype=torch.float64)
    points = (torch.arange(n, dtype=torch.float64) + start) / n
    return torch.searchsorted(normalised(log_w).cumsum(0), points).clamp_max(len(log_w) - 1)


def exact_draws(
    draw: Callable[[int, int], tuple[Tensor, Tensor]], n: int, fewest: int, generator: torch.Generator
) -> Tensor:
    """n draws of the law that weighted rows follow, resampled from as many rows as n and ``fewest`` effective draws take.

    Args:
        draw: (how many, number of the call) → rows (m, *event) and their log weights (m,).
        n: Draws.
        fewest: Effective draws that the weights must be worth for their law to be trusted.
        generator: Of the resampling.

    Raises:
        TiltflowError: 64 times as many rows as at first are worth too few draws.
    """
    rows, log_w, wanted = [], [], max(n, fewest)
    for i in range(MOST):
        x, w = draw(max(OVERSAMPLED * n, fewest), i)
        rows.append(x)
        log_w.append(w)
        weights = torch.cat(log_w)
        if (size := ess(weights) * len(weights)) >= wanted:
            x, picked = torch.cat(rows), systematic(weights, generator, n)
            order = torch.randperm(n, generator=generator, device=generator.device).cpu()
            return x[picked[order].to(x.device)]
    raise TiltflowError(
        f"{len(weights)} paths are worth {size:.0f} exact draws, and {wanted} are needed: the model is too far from the "
        "tilt. Train it further, or lower the strength."
    )
