r"""Systems of identical particles, invariant under translation, rotation and permutation: E is a sum over pairs.

    dw4     4 particles in 2-D, double wells of the distance
    lj13    13 particles in 3-D, Lennard-Jones and a harmonic trap
    lj55    the same with 55

States are x (B, N, m) with the centre of mass at zero, a space of dimension m(N − 1). That an energy belongs to a set of
samples is decided by the virial identity E[x·∇E] = m(N − 1), see :func:`tiltflow.energies.reference.virial`: it tells a
pair counted once from a pair counted twice. (Köhler, Klein & Noé 2020, arXiv:2006.02425.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.geometry import Centred
from tiltflow.energies.problem import EnergyProblem
from tiltflow.energies.reference import load_reference
from tiltflow.energies.tempering import Tempering


@cache
def _pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(n, n, 1, device=device)
    return first, second


def _separations(x: Tensor) -> Tensor:
    """x_i − x_j for i < j: (m, pairs, B). The batch comes last, so that gathering pairs, and its gradient, copy rows."""
    first, second = _pairs(x.shape[1], x.device)
    columns = x.permute(2, 1, 0).contiguous()
    return columns.index_select(1, first) - columns.index_select(1, second)


@dataclass(frozen=True)
class DoubleWell:
    """E = Σ_{i<j} [−4 d² + 0.9 d⁴], d = ‖x_i − x_j‖ − 4; x (B, N, m), E (B,). Where particles coincide ∇E is set to 0."""

    quadratic: float = -4.0
    quartic: float = 0.9
    distance: float = 4.0

    def __call__(self, x: Tensor) -> Tensor:
        square = (torch.linalg.vector_norm(_separations(x), dim=0) - self.distance).square()
        return (square * (self.quadratic + self.quartic * square)).sum(0)


@dataclass(frozen=True)
class LennardJones:
    """E = ε Σ_{i<j} [r⁻¹² − 2r⁻⁶] + ½k Σ_i ‖x_i − x̄‖², ε = 2, k = 1; x (B, N, m), E (B,).

    Nothing is softened: E is +∞ where particles coincide or r⁻¹² overflows (r < 7e-4 in float32), and ∇E is NaN there.
    An ``Evaluator`` rejects such rows.
    """

    depth: float = 2.0
    spring: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        inverse = _separations(x).square().sum(0).reciprocal()
        r6 = inverse * inverse * inverse
        trap = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
        return self.depth * (r6 * (r6 - 2)).sum(0) + 0.5 * self.spring * trap


def dw4() -> EnergyProblem:
    """Four particles in the plane; 10,000 reference samples."""
    return EnergyProblem(
        name="dw4",
        energy=DoubleWell(),
        event_shape=(4, 2),
        geometry=Centred(),
        scale=2.0,
        finest=0.025,
        reference=partial(load_reference, "dw4"),
        settings={
            "rounds": 400, "minibatch": 256, "buffer_rounds": 20, "steps": 60, "draw_steps": 400, "sigma_min": 0.1,
            "learning_rate": 2e-3,
        },
    )  # fmt: skip


def _lennard_jones(particles: int, scale: float, replicas: int, settings: dict[str, Any]) -> EnergyProblem:
    name = f"lj{particles}"
    return EnergyProblem(
        name=name,
        energy=LennardJones(),
        event_shape=(particles, 3),
        geometry=Centred(),
        scale=scale,
        finest=0.01,
        reference=partial(load_reference, name),
        tempering=Tempering(replicas=replicas),
        settings={"sigma_min": 0.03, "learning_rate": 2e-3, "minimum_ess": 0.2, **settings},
    )


def lj13() -> EnergyProblem:
    """Thirteen particles, an icosahedron when cold; 10,000 reference samples."""
    settings = {"rounds": 140, "gradient_steps": 75, "minibatch": 256, "buffer_rounds": 20}
    return _lennard_jones(13, 1.0, 14, settings | {"steps": 60, "draw_steps": 400, "layers": 4})


def lj55() -> EnergyProblem:
    """Fifty-five particles, two icosahedral shells when cold."""
    settings = {"rounds": 100, "batch": 64, "gradient_steps": 60, "minibatch": 32, "buffer_rounds": 30}
    return _lennard_jones(55, 1.5, 28, settings | {"steps": 40, "draw_steps": 100})
