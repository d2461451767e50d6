r"""Which λ? What base samples x_i ~ p_base alone predict of the tilt p* ∝ p_base e^{λr}, before any training.

With the self-normalised weights w_i ∝ e^{λ r(x_i)}, Σw_i = 1:

    E*[f] ≈ Σ w_i f(x_i),    log Z ≈ log mean e^{λ r_i},    ESS(λ) = 1/(N Σw_i²)

ESS never rises with λ ≥ 0, because d log ESS/dλ = 2(E_λ[r] − E_{2λ}[r]) ≤ 0; so "the largest λ with ESS ≥ 5 %" is one
number. All standard errors are first order in 1/√N, and mean little where N·ESS is small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.weights import ess, evidence, normalised


class StrengthRow(NamedTuple):
    """The tilt of strength λ as base samples see it; judge: mean held-out score under the tilt, None without a judge."""

    strength: float
    mean_reward: float
    mean_reward_error: float
    ess: float
    ess_error: float
    log_z: float
    log_z_error: float
    judge: float | None
    judge_error: float | None


def tilted_mean(values: Tensor, log_w: Tensor) -> tuple[float, float]:
    """Σ w f and its standard error √(Σ w²(f − Σwf)²), for values f (N,) and log weights (N,)."""
    w, f = normalised(log_w), double(values)
    mean = (w * f).sum()
    return float(mean), float((w * (f - mean)).norm())


def predict_tilt(rewards: Tensor, strength: float, judged: Tensor | None = None) -> StrengthRow:
    """One row of the table from r(x_i) (N,) at base samples, and a held-out judge's scores (N,) of the same samples."""
    log_w = strength * double(rewards)
    mean, error = tilted_mean(rewards, log_w)
    w, seen = normalised(log_w), evidence(log_w)
    influence = 2 * len(w) * w - w**2 / (w**2).mean()  # of each sample on log ESS, up to a constant
    ess_error = seen.ess * float(influence.std()) / math.sqrt(len(w))
    judge = (None, None) if judged is None else tilted_mean(judged, log_w)
    return StrengthRow(strength, mean, error, seen.ess, ess_error, seen.log_z, seen.log_z_error, *judge)


def largest_strength(rewards: Tensor, min_ess: float = 0.05) -> float | None:
    """The largest λ whose weights keep ESS ≥ ``min_ess``, by bisection.

    None if every λ does: the reward is constant, or that share of the samples already has its highest value.
    """
    spread = float(double(rewards).std())
    if spread == 0.0:
        return None
    low, high = 0.0, 1 / spread
    while ess(high * double(rewards)) >= min_ess:
        low, high = high, 2 * high
        if high * spread > 1e9:
            return None
    while high - low > 1e-6 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(middle * double(rewards)) >= min_ess else (low, middle)
    return low
