"""MMFF94 in torch, kcal/mol: all conformers of a molecule at once (T. A. Halgren, J. Comput. Chem. 17, 490, 1996).

RDKit types the atoms and looks up the constants; the terms are :mod:`tiltflow.molecules.energies.mmff_terms`. They are
finite at any distance: atoms on top of each other cost some 10⁷ kcal/mol.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple, Self

import torch
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers
from torch import Tensor

from tiltflow.molecules.energies.interface import Unit, UnsupportedMolecule, check_molecule, check_positions
from tiltflow.molecules.energies.mmff_terms import Slopes, bend, contact, out_of_plane, stretch, torsion
from tiltflow.molecules.molecule import Molecule

LINEAR = {4, 53, 61}
"""Types with two linear bonds: of an alkyne or allene, of =N= and of an isonitrile or diazonium."""
TWISTED = {Chem.HybridizationType.SP2, Chem.HybridizationType.SP3}
"""The atoms about whose bonds RDKit has torsions: those of hypervalent sulfur have none."""
FEWER = 0.75
"""Electrostatic energy of atoms three bonds apart, as a share."""
ROWS, CHUNK = 512, 2**17
"""Conformers at once; most bytes of an array on the way, so that it stays in a processor's cache."""


class Term(NamedTuple):
    """``energies(*squares, *constants)`` of ``pairs`` (Q, M), rows of all squared distances; ``constants`` each (M, 1)."""

    energies: Callable[..., tuple[Tensor, Slopes]]
    pairs: Tensor
    constants: tuple[Tensor, ...]

    def split(self, x: Tensor, most: int) -> list[Self]:
        """Parts of at most so many rows, with constants in the dtype of x, but booleans, on its device."""
        constants = [c.to(x.device) if c.dtype == torch.bool else c.to(x) for c in self.constants]
        parts = zip(self.pairs.to(x.device).split(most, 1), zip(*(c.split(most) for c in constants)))
        return [self._replace(pairs=pairs, constants=some) for pairs, some in parts]


class MMFF94:
    """MMFF94 in vacuum, all pairs of atoms, no cut-off; in the dtype and on the device of x.

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
        self._atoms = mol.GetNumAtoms()
        self._pairs = torch.triu_indices(self._atoms, self._atoms, 1)
        self._terms = mmff_terms(mol, parameters)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_positions(self, x, self._atoms)
        most = max(1, CHUNK // (x.element_size() * max(1, min(len(x), ROWS))))
        terms = [part for term in self._terms for part in term.split(x, most)]
        pairs = self._pairs.to(x.device).split(most, 1)
        energy, forces = x.new_empty(len(x)), torch.empty_like(x)
        for rows in torch.arange(len(x), device=x.device).split(ROWS):
            across = x.detach()[rows].permute(2, 1, 0).contiguous()
            squares = torch.cat([(_apart(across, ij) ** 2).sum(0) for ij in pairs])
            energy[rows], slopes = _sum(terms, squares)
            pulls = torch.zeros_like(across)
            for ij, slope in zip(pairs, slopes.mul_(2).split(most)):
                pull = _apart(across, ij).mul_(slope)
                pulls.index_add_(1, ij[0], pull, alpha=-1).index_add_(1, ij[1], pull)
            forces[rows] = pulls.permute(2, 1, 0)
        bad = ~(energy.isfinite() & forces.flatten(1).isfinite().all(1))
        return energy.masked_fill(bad, torch.nan), forces.masked_fill(bad[:, None, None], torch.nan)


def _apart(across: Tensor, pairs: Tensor) -> Tensor:
    """Differences (3, P, B) of positions (3, N, B)."""
    return across.index_select(1, pairs[0]) - across.index_select(1, pairs[1])


def _sum(terms: list[Term], squares: Tensor) -> tuple[Tensor, Tensor]:
    """E (B,) of squared distances (P, B), and ∂E/∂squares."""
    energy, slopes = squares.new_zeros(squares.shape[1]), torch.zeros_like(squares)
    for term in terms:
        values, parts = term.energies(*(squares.index_select(0, pairs) for pairs in term.pairs), *term.constants)
        energy += values.sum(0)
        for pairs, part in zip(term.pairs, parts):
            slopes.index_add_(0, pairs, part)
    return energy, slopes


def mmff_terms(mol: Chem.Mol, parameters: Any) -> list[Term]:
    """The terms of a molecule, with RDKit's constants for it (``MMFFMolProperties``)."""
    near = [sorted(a.GetIdx() for a in atom.GetNeighbors()) for atom in mol.GetAtoms()]
    made = [
        _term(stretch, "01", len(near), _stretches(mol, parameters)),
        _term(bend, "01 21 02", len(near), _bends(mol, near, parameters)),
        _term(out_of_plane, "01 21 31 02 03 23", len(near), _out_of_planes(mol, near, parameters)),
        _term(torsion, "01 12 23 02 13 03", len(near), _torsions(mol, near, parameters)),
        _term(contact, "01", len(near), _contacts(mol, near, parameters)),
    ]
    return [term for term in made if term is not None]


Row = tuple[tuple[int, ...], tuple[float, ...]]
"""The atoms of a term and its constants."""


def _term(energies: Callable[..., tuple[Tensor, Slopes]], between: str, atoms: int, rows: list[Row]) -> Term | None:
    """``between``: which of the term's atoms its distances join."""
    if not rows:
        return None

    def pair(a: int, b: int) -> int:
        i, j = min(a, b), max(a, b)
        return i * (2 * atoms - i - 1) // 2 + j - i - 1

    pairs = [[pair(a[int(one)], a[int(other)]) for a, _ in rows] for one, other in map(tuple, between.split())]
    columns = zip(*(constants for _, constants in rows))
    made = [torch.tensor(c, dtype=torch.bool if isinstance(c[0], bool) else torch.float64)[:, None] for c in columns]
    return Term(energies, torch.tensor(pairs), tuple(made))


def _stretches(mol: Chem.Mol, parameters: Any) -> list[Row]:
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds()]
    return [(bond, parameters.GetMMFFBondStretchParams(mol, *bond)[1:]) for bond in bonds]


def _bends(mol: Chem.Mol, near: list[list[int]], parameters: Any) -> list[Row]:
    rows: list[Row] = []
    for j in range(len(near)):
        linear = parameters.GetMMFFAtomType(j) in LINEAR
        for i, k in combinations(near[j], 2):
            _, force, angle = parameters.GetMMFFAngleBendParams(mol, i, j, k)
            lengths = [parameters.GetMMFFBondStretchParams(mol, end, j)[2] for end in (i, k)]
            found = None if linear else parameters.GetMMFFStretchBendParams(mol, i, j, k)
            coupled = (0.0, 0.0) if found is None else found[1:]
            rows.append(((i, j, k), (force, angle, linear, *coupled, *lengths)))
    return rows


def _out_of_planes(mol: Chem.Mol, near: list[list[int]], parameters: Any) -> list[Row]:
    rows: list[Row] = []
    for j, three in enumerate(near):
        if len(three) == 3:
            a, b, c = three
            force = parameters.GetMMFFOopBendParams(mol, a, j, b, c)
            if force is not None:
                rows += [((i, j, k, out), (force,)) for i, k, out in ((a, b, c), (a, c, b), (b, c, a))]
    return rows


def _torsions(mol: Chem.Mol, near: list[list[int]], parameters: Any) -> list[Row]:
    rows: list[Row] = []
    for bond in mol.GetBonds():
        j, k = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if not {bond.GetBeginAtom().GetHybridization(), bond.GetEndAtom().GetHybridization()} <= TWISTED:
            continue
        for i in near[j]:
            for last in near[k]:
                if i in (k, last) or last == j:
                    continue
                found = parameters.GetMMFFTorsionParams(mol, i, j, k, last)
                if found is not None and any(found[1:]):
                    rows.append(((i, j, k, last), found[1:]))
    return rows


def _contacts(mol: Chem.Mol, near: list[list[int]], parameters: Any) -> list[Row]:
    """All pairs at least three bonds apart."""
    rows: list[Row] = []
    bonds = Chem.GetDistanceMatrix(mol)
    charges = [parameters.GetMMFFPartialCharge(i) for i in range(len(near))]
    for i, j in combinations(range(len(near)), 2):
        if bonds[i, j] >= 3:
            _, _, radius, well = parameters.GetMMFFVdWParams(i, j)
            share = FEWER if bonds[i, j] == 3 else 1.0
            rows.append(((i, j), (radius, well, share * charges[i] * charges[j])))
    return rows
