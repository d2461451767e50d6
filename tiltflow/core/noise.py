r"""Noise schedules σ(t) of the generative SDE dX = [v + σ²/(2η)(v − κx)] dt + σ dB.

For an uncontrolled process every σ gives the same marginals. For fine-tuning it does not: the tilted end law is right
only if X_0 and X_1 are independent (*memoryless*), which σ² = 2η guarantees (Domingo-Enrich et al. 2025,
arXiv:2409.08861, Theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant

NoiseSchedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Constant:
    """σ(t) = value. Not memoryless: for sampling, and as the negative control of fine-tuning."""

    value: float

    def __call__(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


def zero(t: Tensor) -> Tensor:
    """σ(t) = 0: the probability-flow ODE."""
    return torch.zeros_like(t)


@dataclass(frozen=True)
class Memoryless:
    r"""σ² = 2η + χ(t), with the paper's offset h: η_h = ((β + h)/(α + h)) W.

    h = 0 is the exact schedule, infinite where α = 0; on the linear path h = 1/K gives σ² = 2(1−t+h)/(t+h), the
    Euler–Maruyama setting of the Adjoint Matching paper. χ ≠ 0 is memoryless too, but its noising kernel depends on
    the data, so the chain, the re-noising projections and "sample with any schedule" are for χ = 0 only.
    """

    interpolant: Interpolant
    offset: float = 0.0
    chi: float = 0.0

    def __post_init__(self) -> None:
        inside = torch.linspace(0.01, 1.0, 100, dtype=torch.float64)
        lowest = float((2 * self.interpolant.eta(inside)).min()) if self.chi else 0.0
        if not lowest + self.chi >= 0:
            raise TiltflowError(f"chi = {self.chi:g} makes σ² = 2η + χ negative: the least 2η is {lowest:.3g}. Give χ ≥ 0.")

    def __call__(self, t: Tensor) -> Tensor:
        if self.offset == 0.0:
            eta = self.interpolant.eta(t)
        else:
            alpha, beta = self.interpolant.alpha(t), self.interpolant.beta(t)
            eta = (beta + self.offset) / (alpha + self.offset) * self.interpolant.wronskian(t)
        return (2 * eta + self.chi).sqrt()


def memoryless_residual(interpolant: Interpolant, noise: NoiseSchedule, cutoff: float = 1e-6) -> float:
    r"""corr(X_0, X_1) per coordinate of the generative SDE on N(0, I) data: exp(−½∫_0^1 σ²/(α² + β²) dt).

    Zero for a memoryless schedule on a path with α_0 = 0; α_0 for the memoryless VP process; .97 and .46 for σ = .2 and
    σ = 1 on the linear path. The integral starts at t = ``cutoff`` on a logarithmic grid (σ may be infinite at 0), so
    that an exactly memoryless schedule returns a small number rather than 0.

    >>> from tiltflow.core.interpolant import Linear
    >>> round(memoryless_residual(Linear(), Constant(1.0)), 2)
    0.46
    """
    left = torch.logspace(math.log10(cutoff), math.log10(0.5), 4001, dtype=torch.float64)
    t = torch.cat([left, 1 - left.flip(0)[1:]])  # fine at both ends: VP and geometric noise vary quickly there
    variance = interpolant.alpha(t) ** 2 + interpolant.beta(t) ** 2
    return math.exp(-0.5 * torch.trapezoid(noise(t) ** 2 / variance, t).item())
