r"""Molecular mechanics through OpenMM: E(x) = U(x) / kT and its forces, x (B, atoms, 3) in nm.

Alanine dipeptide (22 atoms, Amber ff96, vacuum, no constraints) is the usual first molecule: its slow coordinates are the
backbone torsions φ and ψ, given here by their atoms. Needs OpenMM and OpenMM-Tools, which are imported when asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred
from tiltflow.energies.evaluator import differentiable
from tiltflow.energies.problem import EnergyProblem

PHI = (4, 6, 8, 14)
"""Atoms C–N–Cα–C of the torsion φ of alanine dipeptide."""
PSI = (6, 8, 14, 16)
"""Atoms N–Cα–C–N of the torsion ψ."""
GAS_CONSTANT = 8.31446261815324e-3
"""kJ/(mol K)."""
TEMPERATURE = 300.0


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise TiltflowError(f"{name} is missing; install it with `pip install openmm openmmtools`.") from error


class OpenMMEnergy:
    """U(x) / kT of an OpenMM ``System``: a ForceProvider, and a callable that is differentiable once.

    Args:
        system: an ``openmm.System`` without constraints (with them, e^{−E} lives on a surface).
        temperature: in K, sets kT.
        platform: name of the OpenMM platform. "Reference" computes in double precision on one thread.

    Rows are evaluated one after the other. A row that is not finite gets a NaN energy, and is for the Evaluator to reject.

    Raises:
        TiltflowError: OpenMM is missing; the temperature is not positive; the system has constraints.
    """

    def __init__(self, system: Any, temperature: float = TEMPERATURE, platform: str = "Reference") -> None:
        openmm = _module("openmm")
        if not temperature > 0:
            raise TiltflowError(f"the temperature must be positive, got {temperature} K.")
        if system.getNumConstraints():
            raise TiltflowError(f"the system has {system.getNumConstraints()} constraints; build it with constraints=None.")
        self.atoms: int = system.getNumParticles()
        self.kt = GAS_CONSTANT * temperature
        engine = openmm.Platform.getPlatformByName(platform)
        self._context = openmm.Context(system, openmm.VerletIntegrator(0.001), engine)
        self._energy_unit = openmm.unit.kilojoule_per_mole
        self._force_unit = openmm.unit.kilojoule_per_mole / openmm.unit.nanometer

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E (B,) in kT and −∇E (B, atoms, 3) in kT/nm, float64, of x in nm."""
        if x.shape[1:] != (self.atoms, 3):
            raise TiltflowError(f"x has shape {tuple(x.shape)}; this system takes (B, {self.atoms}, 3), in nm.")
        positions = x.detach().cpu().double().numpy()
        energy, forces = np.full(len(x), np.nan), np.full(positions.shape, np.nan)
        for i in np.flatnonzero(np.isfinite(positions).all((1, 2))):
            self._context.setPositions(positions[i])
            state = self._context.getState(getEnergy=True, getForces=True)
            energy[i] = state.getPotentialEnergy().value_in_unit(self._energy_unit)
            forces[i] = state.getForces(asNumpy=True).value_in_unit(self._force_unit)
        return torch.from_numpy(energy) / self.kt, torch.from_numpy(forces) / self.kt

    def __call__(self, x: Tensor) -> Tensor:
        """E (B,) in the dtype of x."""
        return differentiable(self, x)


def alanine() -> EnergyProblem:
    """Alanine dipeptide in vacuum at 300 K; lengths in nm. Raises TiltflowError if OpenMM or OpenMM-Tools are missing."""
    _module("openmm")
    system = _module("openmmtools.testsystems").AlanineDipeptideVacuum(constraints=None).system
    return EnergyProblem(
        name="alanine",
        energy=OpenMMEnergy(system),
        event_shape=(22, 3),
        geometry=Centred(),
        scale=0.25,
        finest=0.0003,
        identical=False,
    )
