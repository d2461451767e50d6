r"""Torsional coordinates: a molecule whose bond lengths, angles and rings are those of a template, turned about its bonds.

θ ∈ [−π, π)^D are the dihedral angles of the rotatable bonds: RDKit's pattern (Lipinski), those of hydroxyl, thiol and amino
hydrogens, which decide about hydrogen bonds, and the turn of one end of an alkyne against the other, about the line between
them. The bonds between C=O, C=N or C=S and N, O or S (amides, esters, acids)
hardly turn and belong to the template, unless ``conjugated`` ones are asked for. x(θ) turns, bond after bond, the atoms
on its smaller side about the bond by θ_k minus the template's angle; turning one bond leaves every other dihedral as it is,
so that their order matters only to a motion of the whole molecule. Densities in these coordinates are with respect to dθ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rdkit import Chem
from rdkit.Chem.Lipinski import RotatableBondSmarts
from torch import Tensor

from tiltflow.molecules.molecule import Molecule

HYDROXYL = Chem.MolFromSmarts("[!H3;!X1;!$(*#*)]-!@[$([OX2H1]),$([SX2H1])]")
AMINO = Chem.MolFromSmarts("[!H3;!X1;!$(*#*)]-!@[$([NX3H2]),$([PX3H2])]")
SILENT = Chem.MolFromSmarts(
    "[$([CX4H3]),$([NX4H3]),$([SiH3]),$(C(F)(F)F),$(C(Cl)(Cl)Cl),$(C(Br)(Br)Br),$(C([CH3])([CH3])[CH3])]"
)
"""Ends of an alkyne whose turns change nothing."""
CONJUGATED = Chem.MolFromSmarts("[CX3;$(C=[O,N,S])]-!@[#7,#8,#16]")
"""Amides, esters, acids, amidines and the like."""


class Torsions(NamedTuple):
    """``atoms`` (D, 4): of each dihedral; the bond joins the middle two. ``moving`` (D, N), bool: atoms beyond the bond."""

    atoms: Tensor
    moving: Tensor


def rotatable_torsions(molecule: Molecule, conjugated: bool = False) -> Torsions:
    """The rotatable bonds of a molecule, each with one dihedral (heavy atoms first) and its smaller side."""
    mol = molecule.mol
    heavy = Chem.RemoveAllHs(mol)  # the patterns are for hydrogen-free graphs
    names = [a.GetIdx() for a in mol.GetAtoms() if a.GetAtomicNum() > 1]
    bonds = {tuple(sorted(m)) for m in heavy.GetSubstructMatches(RotatableBondSmarts)}
    for pattern in (HYDROXYL, AMINO):
        bonds |= {tuple(sorted(m)) for m in heavy.GetSubstructMatches(pattern)}
    if not conjugated:
        bonds -= {tuple(sorted(m)) for m in heavy.GetSubstructMatches(CONJUGATED)}
    lines = {(path[0], path[-1]): path[-2] for path in alkynes(mol)}
    atoms, moving = [], []
    for b, c in [*((names[i], names[j]) for i, j in sorted(bonds)), *sorted(lines)]:
        if (b, c) in lines:
            beyond = _side(mol, lines[b, c], c)
            atoms.append([_end(mol, b), b, c, _end(mol, c)])
            beyond[c] = False
            moving.append(beyond)
            continue
        beyond = _side(mol, b, c)
        if 2 * int(beyond.sum()) > len(beyond):
            b, c = c, b
            beyond = _side(mol, b, c)
        atoms.append([_end(mol, b, c), b, c, _end(mol, c, b)])
        beyond[c] = False  # on the axis
        moving.append(beyond)
    n = mol.GetNumAtoms()
    if not atoms:
        return Torsions(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, n, dtype=torch.bool))
    return Torsions(torch.tensor(atoms), torch.stack(moving))


def _side(mol: Chem.Mol, b: int, c: int) -> Tensor:
    """Atoms that are reached from c without crossing b–c, (N,), bool."""
    seen = torch.zeros(mol.GetNumAtoms(), dtype=torch.bool)
    stack = [c]
    while stack:
        i = stack.pop()
        seen[i] = True
        next_ones = [a.GetIdx() for a in mol.GetAtomWithIdx(i).GetNeighbors()]
        stack += [j for j in next_ones if not seen[j] and {i, j} != {b, c}]
    return seen


def alkynes(mol: Chem.Mol) -> list[list[int]]:
    """Paths b–C≡C–c through alkynes, and diynes and so on, that are in no ring and whose two ends make a dihedral."""
    found = []
    for bond in mol.GetBonds():
        b, inner = bond.GetBeginAtom(), bond.GetEndAtom()
        for first, second in ((b, inner), (inner, b)):
            path = [first, second]
            while linear(path[-1]) and (more := [a for a in path[-1].GetNeighbors() if a.GetIdx() != path[-2].GetIdx()]):
                path.append(more[0])
            ends = linear(first) or linear(path[-1]) or bond.IsInRing()
            if len(path) > 3 and path[0].GetIdx() < path[-1].GetIdx() and not ends:
                found.append([a.GetIdx() for a in path])
    silent = {i for (i,) in mol.GetSubstructMatches(SILENT)} | {a.GetIdx() for a in mol.GetAtoms() if a.GetDegree() < 2}
    return [path for path in found if not silent & {path[0], path[-1]}]


def linear(atom: Chem.Atom) -> bool:
    """An end of a triple bond."""
    return any(b.GetBondType() == Chem.BondType.TRIPLE for b in atom.GetBonds())


def _end(mol: Chem.Mol, b: int, c: int | None = None) -> int:
    """The neighbour of b that measures the dihedral: of the highest atomic number, then of the lowest index."""
    others = [a for a in mol.GetAtomWithIdx(b).GetNeighbors() if a.GetIdx() != c and (c is not None or not linear(a))]
    return min(others, key=lambda a: (-a.GetAtomicNum(), a.GetIdx())).GetIdx()


def dihedrals(x: Tensor, atoms: Tensor) -> Tensor:
    """Dihedral angles (B, D) in (−π, π], IUPAC's sign, of positions x (B, N, 3) and atoms (D, 4)."""
    p = x[:, atoms]
    first, axis, last = (p[:, :, i + 1] - p[:, :, i] for i in range(3))
    n1, n2 = torch.linalg.cross(first, axis), torch.linalg.cross(axis, last)
    sine = (torch.linalg.cross(n1, n2) * axis).sum(-1) / axis.norm(dim=-1)
    return torch.atan2(sine, (n1 * n2).sum(-1))


def rotated(x: Tensor, b: Tensor, c: Tensor, angle: Tensor) -> Tensor:
    """Points x (B, M, 3) turned about the axis from b to c, (B, 3), by an angle (B,): Rodrigues' formula."""
    axis = torch.nn.functional.normalize(c - b, dim=-1)[:, None]
    arm, cos, sin = x - c[:, None], angle[:, None, None].cos(), angle[:, None, None].sin()
    along = axis * (axis * arm).sum(-1, keepdim=True)
    return (arm - along) * cos + torch.linalg.cross(axis.expand_as(arm), arm) * sin + along + c[:, None]


def place(template: Tensor, torsions: Torsions, angles: Tensor) -> Tensor:
    """x(θ), (B, N, 3), of a template (N, 3), or one per row (B, N, 3), at angles (B, D); differentiable in the angles."""
    x = template.to(angles).expand(len(angles), -1, -1)
    turn = angles - dihedrals(template.reshape(-1, *x.shape[1:]), torsions.atoms).to(angles)
    for k, (_, b, c, _) in enumerate(torsions.atoms.tolist()):
        beyond = torsions.moving[k].nonzero()[:, 0]
        x = x.index_copy(1, beyond, rotated(x[:, beyond], x[:, b], x[:, c], turn[:, k]))
    return x
