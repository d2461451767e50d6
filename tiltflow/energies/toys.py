r"""Energies whose log Z and exact draws come from one-dimensional integrals.

    many-well   32-D, 16 pairs (x, y):  E = Σ (x⁴ − 6x² − x/2 + y²/2): 2¹⁶ modes, unequal (Noé et al. 2019,
                arXiv:1812.01729; Midgley et al. 2023, arXiv:2208.01893)
    funnel      10-D: x_0 ~ N(0, 9), x_i | x_0 ~ N(0, e^{x_0}), log Z = 0 (Neal 2003)
    ring        2-D: E = −log Σ_k exp(−(‖x‖ − R_k)² / 2s²), R = 1, 3, 5, s = .2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltflow.energies.problem import EnergyProblem
from tiltflow.energies.tempering import Tempering

PAIRS, FUNNEL_DIMENSION, FUNNEL_STD = 16, 10, 3.0
RADII, RING_STD = (1.0, 3.0, 5.0), 0.2


@dataclass(frozen=True)
class Line:
    """A density ∝ e^{−E} on [low, high] ⊂ R, negligible beyond, tabulated at ``points``.

    log Z is a trapezoidal sum (its error vanishes faster than any power of the spacing if e^{−E} does at both ends); draws
    invert the cumulative sum, linear within a cell.
    """

    energy: Callable[[Tensor], Tensor]
    low: float
    high: float
    points: int = 20_001

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, float]:
        x = torch.linspace(self.low, self.high, self.points, dtype=torch.float64)
        density = (-self.energy(x)).exp()
        cumulative = torch.cat([x.new_zeros(1), torch.cumulative_trapezoid(density, x)])
        return x, cumulative / cumulative[-1], math.log(float(cumulative[-1]))

    @property
    def log_z(self) -> float:
        """log ∫ e^{−E}."""
        return self._table[2]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws (n,), float64."""
        x, cumulative, _ = self._table
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        right = torch.searchsorted(cumulative, u, right=True).clamp(1, len(x) - 1)
        low, high = cumulative[right - 1], cumulative[right]
        return x[right - 1] + (u - low) / (high - low).clamp_min(1e-300) * (x[right] - x[right - 1])


def double_well(x: Tensor) -> Tensor:
    """x⁴ − 6x² − x/2, elementwise: minima near ±1.73, the right one 5.4 times as heavy."""
    square = x * x
    return square * (square - 6) - 0.5 * x


def many_well_energy(x: Tensor) -> Tensor:
    """E(x), (B,), of x (B, 2n): even coordinates are the wells, odd ones are N(0, 1)."""
    return double_well(x[:, 0::2]).sum(1) + 0.5 * x[:, 1::2].square().sum(1)


def many_well() -> EnergyProblem:
    """Sixteen independent pairs of a double well and a Gaussian."""
    well = Line(double_well, -5.0, 5.0)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, 2 * PAIRS, generator=generator, dtype=torch.float64)
        x[:, 0::2] = well.sample(n * PAIRS, generator).reshape(n, PAIRS)
        return x.to(torch.get_default_dtype())

    log_z = PAIRS * (well.log_z + 0.5 * math.log(2 * math.pi))
    return EnergyProblem(
        name="many-well",
        energy=many_well_energy,
        event_shape=(2 * PAIRS,),
        scale=2.0,
        finest=0.02,
        sample=sample,
        log_z=log_z,
        tempering=Tempering(replicas=12),
    )


def funnel_energy(x: Tensor) -> Tensor:
    """E(x) = −log p(x), (B,), of x (B, d). It is not finite where e^{−x_0} overflows (x_0 < −88 in float32)."""
    neck, rest = x[:, 0], x[:, 1:]
    mouth = 0.5 * (neck / FUNNEL_STD) ** 2 + math.log(FUNNEL_STD)
    width = 0.5 * ((-neck).exp() * rest.square().sum(1) + rest.shape[1] * neck)
    return mouth + width + 0.5 * x.shape[1] * math.log(2 * math.pi)


def funnel() -> EnergyProblem:
    """Neal's funnel in 10-D: widths from e^{−4.5} to e^{4.5} within three standard deviations of x_0."""

    def sample(n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, FUNNEL_DIMENSION, generator=generator, dtype=torch.float64)
        neck = FUNNEL_STD * z[:, :1]
        return torch.cat([neck, (0.5 * neck).exp() * z[:, 1:]], 1).to(torch.get_default_dtype())

    return EnergyProblem(
        name="funnel",
        energy=funnel_energy,
        event_shape=(FUNNEL_DIMENSION,),
        scale=10.0,
        finest=0.005,
        sample=sample,
        log_z=0.0,
    )


def _radial(radius: Tensor) -> Tensor:
    """−log Σ_k exp(−(ρ − R_k)² / 2s²), elementwise."""
    rings = torch.tensor(RADII, dtype=radius.dtype, device=radius.device)
    return -torch.logsumexp(-0.5 * ((radius[..., None] - rings) / RING_STD) ** 2, -1)


def ring_energy(x: Tensor) -> Tensor:
    """E(x), (B,), of x (B, 2). The gradient at the origin, where E has a cusp and e^{−E} is e^{−12}, is set to 0."""
    return _radial(torch.linalg.vector_norm(x, dim=1))


def ring() -> EnergyProblem:
    """Three concentric rings, with masses about as 1 : 3 : 5."""
    radius = Line(lambda rho: _radial(rho) - rho.log(), 0.0, 8.0)  # ρ dρ dθ

    def sample(n: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        return (radius.sample(n, generator)[:, None] * direction).to(torch.get_default_dtype())

    return EnergyProblem(
        name="ring",
        energy=ring_energy,
        event_shape=(2,),
        scale=4.0,
        finest=0.02,
        sample=sample,
        log_z=radius.log_z + math.log(2 * math.pi),
        tempering=Tempering(top=30.0),
    )
