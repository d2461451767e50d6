"""One molecule: a graph with explicit hydrogens, and nothing about its geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rdkit import Chem
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Molecule:
    """A connected, stereochemically defined molecule.

    Args:
        name: from the input, or ``molecule-3`` for the third line.
        smiles: canonical isomeric SMILES without explicit hydrogens.
        mol: RDKit molecule with explicit hydrogens and no conformers; its order of atoms is that of all coordinates.
    """

    name: str
    smiles: str
    mol: Chem.Mol

    @property
    def atomic_numbers(self) -> Tensor:
        """(N,), int64."""
        return torch.tensor([a.GetAtomicNum() for a in self.mol.GetAtoms()])

    @property
    def charge(self) -> int:
        """Formal charge, in e."""
        return Chem.GetFormalCharge(self.mol)

    @property
    def rotatable_bonds(self) -> int:
        """RDKit's count."""
        from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds

        return CalcNumRotatableBonds(self.mol)


def molecule(smiles: str, name: str = "molecule") -> Molecule:
    """The molecule of a SMILES that is known to be good; :mod:`tiltflow.molecules.read` checks those that are not."""
    mol = Chem.MolFromSmiles(smiles)
    return Molecule(name, Chem.MolToSmiles(mol), Chem.AddHs(mol))
