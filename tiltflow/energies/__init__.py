r"""Energies to sample from: p*(x) = e^{−E(x)} / Z with E in kT, and what is known exactly of each.

    gmm9, gmm40, gmm40-50d, unequal2d, gaussian2d   mixtures: exact draws, log Z = 0, mode weights
    many-well, funnel, ring                         log Z and exact draws by quadrature or in closed form
    dw4, lj13, lj55                                 particles with their centre of mass at zero: reference samples
    alanine                                         alanine dipeptide in vacuum, through OpenMM

Samplers do not call an energy but an :class:`Evaluator` of it, which counts, batches, caches and checks. Energies from
elsewhere are a callable (B, *event) → (B,) that autograd can differentiate, or a :class:`ForceProvider`.
"""

from __future__ import annotations

from collections.abc import Callable

from tiltflow.energies.alanine import alanine
from tiltflow.energies.evaluator import Energy, Evaluator, ForceProvider
from tiltflow.energies.mixtures import gaussian2d, gmm9, gmm40, gmm40_50d, unequal2d
from tiltflow.energies.particles import dw4, lj13, lj55
from tiltflow.energies.problem import EnergyProblem, Modes
from tiltflow.energies.reference import load_reference, temperature, virial
from tiltflow.energies.toys import funnel, many_well, ring

__all__ = [
    "ENERGY_PROBLEMS", "Energy", "EnergyProblem", "Evaluator", "ForceProvider", "Modes", "load_reference", "temperature",
    "virial",
]  # fmt: skip

ENERGY_PROBLEMS: dict[str, Callable[[], EnergyProblem]] = {
    p.__name__.replace("_", "-"): p
    for p in (gmm9, gmm40, gmm40_50d, unequal2d, gaussian2d, many_well, funnel, ring, dw4, lj13, lj55, alanine)
}
"""Name → constructor. Nothing is built, and OpenMM is not imported, before the constructor is called."""
