"""GFN2-xTB through tblite, hartree (C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652, 2019).

A self-consistent field per conformer, always from the same guess, so that an energy depends on nothing else. Where it does
not converge, or atoms are on top of each other, the row is NaN.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tiltflow.molecules.energies.interface import (
    BOHR,
    Unit,
    check_molecule,
    environment,
    required,
    row_by_row,
    unpaired_electrons,
)
from tiltflow.molecules.molecule import Molecule


class GFN2:
    """GFN2-xTB in vacuum at the molecule's charge, with RDKit's count of unpaired electrons.

    Set OMP_NUM_THREADS=1: molecules are too small for more.

    Raises:
        UnsupportedMolecule: elements beyond radon.
        TiltflowError: tblite is missing.
    """

    name = "gfn2"
    unit: Unit = "hartree"
    elements = frozenset(range(1, 87))

    def __init__(self, molecule: Molecule) -> None:
        check_molecule(self, molecule, charged=True, radicals=True)
        self._tblite = required("tblite.interface", environment("xtb"))
        self._failure: type[Exception] = required("tblite.exceptions", environment("xtb")).TBLiteRuntimeError
        self._numbers = molecule.atomic_numbers.numpy()
        self._charge, self._unpaired = molecule.charge, unpaired_electrons(molecule)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return row_by_row(self, x, len(self._numbers), self._one)

    def _one(self, positions: np.ndarray) -> tuple[float, np.ndarray] | None:
        try:
            calculator = self._tblite.Calculator(
                "GFN2-xTB", self._numbers, positions / BOHR, charge=self._charge, uhf=self._unpaired
            )
            calculator.set("verbosity", 0)
            result = calculator.singlepoint()
            return float(result["energy"]), -result["gradient"] / BOHR
        except self._failure:  # no convergence, atoms too close
            return None
