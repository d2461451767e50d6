"""MMFF94 through RDKit, kcal/mol (T. A. Halgren, J. Comput. Chem. 17, 490, 1996).

A force field is built once per molecule and told the coordinates; building it again for every conformer would cost a hundred
times its evaluation. Its terms are finite at any distance: atoms on top of each other cost some 10⁷ kcal/mol.
"""

from __future__ import annotations

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers
from torch import Tensor

from tiltflow.molecules.energies.interface import Unit, UnsupportedMolecule, check_molecule, row_by_row
from tiltflow.molecules.molecule import Molecule


class MMFF94:
    """MMFF94 in vacuum, all pairs of atoms, no cut-off.

    Raises:
        UnsupportedMolecule: RDKit has no MMFF94 type for an atom; a radical.
    """

    name = "mmff94"
    unit: Unit = "kcal/mol"
    elements = frozenset({1, 3, 6, 7, 8, 9, 11, 12, 14, 15, 16, 17, 19, 20, 26, 29, 30, 35, 53})

    def __init__(self, molecule: Molecule) -> None:
        check_molecule(self, molecule, charged=True)
        mol = Chem.Mol(molecule.mol)
        parameters = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94")
        if parameters is None:
            raise UnsupportedMolecule(molecule, "MMFF94 parameters are missing for one of its atoms")
        mol.RemoveAllConformers()
        mol.AddConformer(Chem.Conformer(mol.GetNumAtoms()))  # all at the origin: no pair is beyond a cut-off
        self._atoms, self._mol = mol.GetNumAtoms(), mol
        self._field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, parameters, ignoreInterfragInteractions=False)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return row_by_row(self, x, self._atoms, self._one)

    def _one(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        flat = positions.ravel().tolist()
        # the energy first: CalcGrad uses the distances that the last CalcEnergy left, whatever its own argument
        return self._field.CalcEnergy(flat), -np.reshape(self._field.CalcGrad(flat), (-1, 3))
