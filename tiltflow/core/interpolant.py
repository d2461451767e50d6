r"""Interpolants: the reference flow :math:`\bar X_t = \alpha_t \bar X_1 + \beta_t \bar X_0` between noise and data.

Time runs from t = 0 (noise, X_0 ~ N(0, I)) to t = 1 (data). From (α, β) and their derivatives follow

    κ = α̇/α,    η = β (κβ − β̇) = (β/α) W,    W = βα̇ − αβ̇ > 0,

the velocity v = κx + η∇log p_t, and the memoryless noise σ² = 2η. Every method takes a tensor of times of any shape
and returns the same shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Interpolant(ABC):
    """α and β with exact derivatives; subclasses define the four functions, the rest follows."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def d_beta(self, t: Tensor) -> Tensor:
        """dβ/dt."""

    def kappa(self, t: Tensor) -> Tensor:
        """κ = α̇/α (infinite where α = 0)."""
        return self.d_alpha(t) / self.alpha(t)

    def wronskian(self, t: Tensor) -> Tensor:
        """W = βα̇ − αβ̇, the determinant of the map (X_1, X_0) → (x, v); positive on (0, 1)."""
        return self.beta(t) * self.d_alpha(t) - self.alpha(t) * self.d_beta(t)

    def eta(self, t: Tensor) -> Tensor:
        """η = β(κβ − β̇), half the squared memoryless noise (infinite where α = 0)."""
        return self.beta(t) / self.alpha(t) * self.wronskian(t)

    def from_velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of X̂_1 = ax + bv: a = −β̇/W, b = β/W."""
        w = self.wronskian(t)
        return -self.d_beta(t) / w, self.beta(t) / w


@dataclass(frozen=True)
class Linear(Interpolant):
    """Rectified flow: α = t, β = 1 − t, so η = (1−t)/t (Liu et al. 2023, arXiv:2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


@dataclass(frozen=True)
class Cosine(Interpolant):
    """Trigonometric path: α = sin(πt/2), β = cos(πt/2) (Albergo & Vanden-Eijnden 2023, arXiv:2209.15571)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # equals cos(πt/2), exactly zero at t = 1

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.beta(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)


@dataclass(frozen=True)
class VP(Interpolant):
    r"""Variance preserving (DDPM) with linear noise rate: α² + β² = 1, log α = −½∫_0^{1−t} (b_min + s(b_max − b_min)) ds.

    Song et al. 2021, arXiv:2011.13456. α_0 > 0: the process is memoryless up to the residual correlation α_0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _rate(self, t: Tensor) -> Tensor:
        return self.beta_min + (1 - t) * (self.beta_max - self.beta_min)

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -0.5 * (self.beta_min * s + 0.5 * (self.beta_max - self.beta_min) * s**2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def beta(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * self._rate(t) * self.alpha(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return -0.5 * self._rate(t) * self.alpha(t) ** 2 / self.beta(t)  # −∞ at t = 1, where β = 0

    def wronskian(self, t: Tensor) -> Tensor:
        """βα̇ − αβ̇ = κ α (β² + α²)/β = α̇/β."""
        return self.d_alpha(t) / self.beta(t)

    def eta(self, t: Tensor) -> Tensor:
        """η = κ, since α² + β² = 1 (finite everywhere)."""
        return self.kappa(t)

    def kappa(self, t: Tensor) -> Tensor:
        """κ = half the noise rate."""
        return 0.5 * self._rate(t)

    def from_velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = α, b = β²/α̇ (finite at t = 1, where β̇ is not)."""
        return self.alpha(t), self.beta(t) ** 2 / self.d_alpha(t)


@dataclass(frozen=True)
class Follmer(Interpolant):
    r"""Bridge from the point X_0 = 0: X_t | X_1 ~ N(ζX_1, h²ζ(1−ζ) I), with h² the end variance and ζ the clock.

    α = ζ, β = h√(ζ(1−ζ)), η = ½h²ζ̇: the memoryless noise is the Brownian motion's own, σ² = h²ζ̇, and over the base
    N(0, h² I) the drift vanishes. ``ratio`` = 1 is Brownian motion (ζ = t); ``ratio`` r > 1 is the geometric noise
    σ(t) ∝ r^{−t}, ζ = (1 − r^{−2t})/(1 − r^{−2}). Follmer 1985; Havens et al. 2025, arXiv:2504.11713.
    """

    variance: float = 1.0
    ratio: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        if self.ratio == 1.0:
            return t
        rate = 2 * math.log(self.ratio)
        return torch.expm1(-rate * t) / math.expm1(-rate)

    def d_alpha(self, t: Tensor) -> Tensor:
        if self.ratio == 1.0:
            return torch.ones_like(t)
        rate = 2 * math.log(self.ratio)
        return -rate * torch.exp(-rate * t) / math.expm1(-rate)

    def beta(self, t: Tensor) -> Tensor:
        zeta = self.alpha(t)
        return (self.variance * zeta * (1 - zeta)).sqrt()

    def d_beta(self, t: Tensor) -> Tensor:
        zeta = self.alpha(t)
        return 0.5 * self.variance * self.d_alpha(t) * (1 - 2 * zeta) / self.beta(t)  # infinite at both ends

    def wronskian(self, t: Tensor) -> Tensor:
        """βα̇ − αβ̇ = h²ζζ̇/(2β)."""
        return 0.5 * self.variance * self.alpha(t) * self.d_alpha(t) / self.beta(t)

    def eta(self, t: Tensor) -> Tensor:
        """η = ½h²ζ̇."""
        return 0.5 * self.variance * self.d_alpha(t)

    def from_velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = (2ζ−1)/ζ, b = 2(1−ζ)/ζ̇; at ζ = 0, where x = 0, a is taken as 0."""
        zeta = self.alpha(t)
        start = zeta == 0
        a = torch.where(start, 0.0, (2 * zeta - 1) / torch.where(start, 1.0, zeta))
        return a, 2 * (1 - zeta) / self.d_alpha(t)
