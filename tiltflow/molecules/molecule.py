"""One molecule: a graph with explicit hydrogens, and nothing about its geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds
from torch import Tensor

from tiltflow.core.errors import TiltflowError


@dataclass(frozen=True, eq=False)
class Molecule:
    """A connected, stereochemically defined molecule.

    Args:
        name: from the input, or ``molecule-3`` for the third line.
        smiles: canonical isomeric SMILES without explicit hydrogens.
        mol: RDKit molecule with explicit hydrogens and no conformers; its order of atoms is that of all coordinates.
        notes: what a user should hear about how it was understood.
        fields: data of the input, which go into the SD records of its conformers.
        start: (N, 3), float64, Å: a geometry that was given.
    """

    name: str
    smiles: str
    mol: Chem.Mol
    notes: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    start: Tensor | None = None

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
        """RDKit's (strict) count, in which hydrogens have no part."""
        return CalcNumRotatableBonds(Chem.RemoveAllHs(self.mol))


def molecule(smiles: str, name: str = "molecule") -> Molecule:
    """The molecule of a SMILES that is known to be good; :mod:`tiltflow.molecules.read` checks those that are not."""
    mol = Chem.MolFromSmiles(smiles)
    return Molecule(name, Chem.MolToSmiles(mol), Chem.AddHs(mol))


def packed(molecule: Molecule) -> dict[str, Any]:
    """The molecule, but for its start, as texts and bytes (RDKit's own format: JSON would lose what E and Z are)."""
    mol = torch.from_numpy(np.frombuffer(molecule.mol.ToBinary(), np.uint8).copy())
    said = {"name": molecule.name, "smiles": molecule.smiles, "notes": molecule.notes, "fields": dict(molecule.fields)}
    return {**said, "mol": mol}


def unpacked(saved: dict[str, Any]) -> Molecule:
    """The inverse of :func:`packed`."""
    mol = Chem.Mol(saved["mol"].numpy().tobytes())
    return Molecule(saved["name"], saved["smiles"], mol, tuple(saved["notes"]), saved["fields"])


def with_positions(mol: Chem.Mol, positions: Tensor) -> Chem.Mol:
    """A copy with conformers 0 … n−1 at ``positions`` (n, N, 3), Å. Raises TiltflowError for another shape."""
    if positions.shape[1:] != (mol.GetNumAtoms(), 3):
        raise TiltflowError(f"positions must be (n, {mol.GetNumAtoms()}, 3), in Å, not {tuple(positions.shape)}.")
    copy = Chem.Mol(mol)
    copy.RemoveAllConformers()
    for x in positions.detach().cpu().double().numpy():
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.Set3D(True)
        conformer.SetPositions(x)
        copy.AddConformer(conformer, assignId=True)
    return copy


def positions_of(mol: Chem.Mol) -> Tensor:
    """(n, N, 3), float64, Å: the conformers of an RDKit molecule."""
    return torch.from_numpy(np.array([c.GetPositions() for c in mol.GetConformers()]).reshape(-1, mol.GetNumAtoms(), 3))
