"""Discrete labels of a conformer, and whether walkers have crossed between their states.

Labels: rotatable bonds and amides, bonds in rings, and the pyramids of nitrogens, each with a few states. Walkers forget a
label if its state after the moves at the hot temperature says little about its state before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from rdkit import Chem
from torch import Tensor

from tiltflow.molecules.audit import label
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.torsions import Torsions, dihedrals

REMEMBERED = 0.5
"""Cohen's κ between the states before and after, above which a label is not sampled."""
FLAT, BOTH = math.radians(15), 0.02
"""Dihedrals of rings within this of 0 or 180° have no sign; least share of walkers in a second state, before and after."""


def unsampled(molecule: Molecule, torsions: Torsions, hot: Tensor) -> list[str]:
    """Names of the labels of which walkers (2, P, N, 3), before and after, have not forgotten the state."""
    return [name for name, states in _labels(molecule.mol, torsions, hot) if kappa(*states) > REMEMBERED]


def kappa(before: Tensor, after: Tensor) -> float:
    """Cohen's κ of the states (P,) of each walker: 1, nothing changed; 0, independent, or one state only."""
    states = torch.stack([before, after]).unique()
    shares = [(side[:, None] == states).double().mean(0) for side in (before, after)]
    chance = float((shares[0] * shares[1]).sum())
    if 1 - chance < BOTH:
        return 0.0
    return (float((before == after).double().mean()) - chance) / (1 - chance)


def _labels(mol: Chem.Mol, torsions: Torsions, hot: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    pair = (hot[0], hot[1])
    for atoms in torsions.atoms.tolist():
        states = tuple(_wells(dihedrals(x, torch.tensor([atoms]))[:, 0]) for x in pair)
        yield "bond " + _bond(mol, *atoms[1:3]), states  # type: ignore[misc]
    for atoms in puckers(mol):
        states = tuple(_bend(dihedrals(x, torch.tensor([atoms]))[:, 0]) for x in pair)
        yield "ring bond " + _bond(mol, *atoms[1:3]), states  # type: ignore[misc]
    for atom in pyramids(mol):
        near = [n.GetIdx() for n in atom.GetNeighbors()]
        arms = [x[:, near] - x[:, [atom.GetIdx()]] for x in pair]
        yield "nitrogen " + label(atom), (torch.linalg.det(arms[0]) > 0, torch.linalg.det(arms[1]) > 0)


def has_states(molecule: Molecule, torsions: Torsions) -> bool:
    """Whether there is more than one conformer to look for: a torsion, a ring that puckers, or a nitrogen that inverts."""
    return bool(len(torsions.atoms) or puckers(molecule.mol) or pyramids(molecule.mol))


def pyramids(mol: Chem.Mol) -> list[Chem.Atom]:
    """Nitrogens with three single bonds, none of them conjugated."""

    def single(atom: Chem.Atom) -> bool:
        return all(b.GetBondTypeAsDouble() == 1 and not b.GetIsConjugated() for b in atom.GetBonds())

    return [a for a in mol.GetAtoms() if a.GetAtomicNum() == 7 and a.GetDegree() == 3 and single(a)]


def puckers(mol: Chem.Mol) -> list[tuple[int, int, int, int]]:
    """A dihedral within the ring for each single, unconjugated bond of rings of four atoms and more."""
    found = []
    for bond in mol.GetBonds():
        if bond.IsInRing() and not bond.GetIsConjugated() and bond.GetBondTypeAsDouble() == 1:
            b, c = bond.GetBeginAtom(), bond.GetEndAtom()
            a, d = (_in_ring(end, other) for end, other in ((b, c), (c, b)))
            if a != d:
                found.append((a, b.GetIdx(), c.GetIdx(), d))
    return found


def _wells(angles: Tensor) -> Tensor:
    """0, 1 or 2: about 60°, 180° or −60°."""
    return torch.remainder(angles, 2 * math.pi).div(2 * math.pi / 3).floor().clamp_max(2)


def _bend(angles: Tensor) -> Tensor:
    """The sign of a ring's dihedral; 0 where it is flat."""
    return angles.sign() * ((angles.abs() > FLAT) & (angles.abs() < math.pi - FLAT))


def _in_ring(end: Chem.Atom, other: Chem.Atom) -> int:
    """A neighbour of one end of a ring's bond in a ring with it."""
    bonds = [b for b in end.GetBonds() if b.IsInRing()]
    return min(b.GetOtherAtomIdx(end.GetIdx()) for b in bonds if b.GetOtherAtomIdx(end.GetIdx()) != other.GetIdx())


def _bond(mol: Chem.Mol, i: int, j: int) -> str:
    return "–".join(label(mol.GetAtomWithIdx(k)) for k in (i, j))
