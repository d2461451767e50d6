"""Any calculator of ASE, eV (A. H. Larsen et al., J. Phys.: Condens. Matter 29, 273002, 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies.interface import Unit, required, row_by_row
from tiltflow.molecules.molecule import Molecule


class ASEEnergy:
    """A calculator's energy of the molecule in vacuum, one conformer after the other.

    Args:
        calculator: an ASE calculator with energy and forces; charge and spin are for it to know.
        molecule: whose atoms, in their order, the calculator is given.
        name: for messages.

    A calculation that fails (``CalculationFailed``) is a NaN row.

    Raises:
        TiltflowError: ASE is missing; the calculator has no forces.
    """

    unit: Unit = "eV"
    elements = None

    def __init__(self, calculator: Any, molecule: Molecule, name: str = "ase") -> None:
        advice = "install it with `pip install 'tiltflow[ase]'`"
        self.name = name
        self._failures: type[Exception] = required("ase.calculators.calculator", advice).CalculationFailed
        self._atoms = required("ase", advice).Atoms(numbers=molecule.atomic_numbers.numpy())
        self._atoms.calc = calculator
        lacking = {"energy", "forces"} - set(calculator.implemented_properties)
        if lacking:
            kind = type(calculator).__name__
            raise TiltflowError(f"{name}: the calculator {kind} has no {' and no '.join(sorted(lacking))}; use another.")

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return row_by_row(self, x, len(self._atoms), self._one)

    def _one(self, positions: np.ndarray) -> tuple[float, np.ndarray] | None:
        self._atoms.set_positions(positions)
        try:
            return float(self._atoms.get_potential_energy()), self._atoms.get_forces()
        except self._failures:
            return None
