"""Templates: what torsions leave rigid. Bond lengths, angles and rings come from RDKit's embedding, relaxed with MMFF94."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule, positions_of, with_positions
from tiltflow.molecules.torsions import Torsions, dihedrals

RELAXATION = 200
LONGEST = 60
"""Seconds after which RDKit gives up to embed: a cage that cannot exist would keep it busy for hours."""
SAME = math.radians(40)
"""Two geometries are of one kind if none of their rigid dihedrals differs by more."""


def embed(molecule: Molecule, n: int, seed: int, relaxed: bool = False) -> Tensor:
    """n conformers of RDKit's ETKDGv3, (n, N, 3) in Å, float64; ``relaxed``: by :func:`relax`, where MMFF94 has parameters.

    Fewer come back if some embeddings fail. Riniker & Landrum, J. Chem. Inf. Model. 55, 2562, 2015.

    Raises:
        TiltflowError: none could be embedded.
    """
    mol = Chem.Mol(molecule.mol)
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed, parameters.numThreads, parameters.timeout = seed, 1, LONGEST
    parameters.enableSequentialRandomSeeds = True  # else conformer k has the seed k·seed, and of seed 0 all are the same
    if not rdDistGeom.EmbedMultipleConfs(mol, n, parameters):
        parameters.useRandomCoords = True
        rdDistGeom.EmbedMultipleConfs(mol, n, parameters)
    if not mol.GetNumConformers():
        raise TiltflowError(
            f"{molecule.name} ({molecule.smiles}): RDKit finds no 3-D geometry for it; is its stereochemistry possible?"
        )
    x = positions_of(mol)
    return relax(molecule, x) if relaxed and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol) else x


def relax(molecule: Molecule, positions: Tensor) -> Tensor:
    """positions (n, N, 3) after at most 200 iterations of MMFF94 (Halgren 1996). TiltflowError: no parameters for it."""
    mol = with_positions(molecule.mol, positions)
    if not rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        raise TiltflowError(f"MMFF94 has no parameters for {molecule.name!r} ({molecule.smiles}).")
    rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, numThreads=1, maxIters=RELAXATION, mmffVariant="MMFF94")
    return positions_of(mol)


class Templates(NamedTuple):
    """``positions`` (J, N, 3) in Å; ``share`` (J,): of all embeddings, those of its kind."""

    positions: Tensor
    share: Tensor


def templates(molecule: Molecule, torsions: Torsions, most: int, seed: int, embeddings: int = 24) -> Templates:
    """The commonest kinds of rigid geometry (rings, amides, ring nitrogens) among relaxed embeddings, at most ``most``.

    A geometry that came with the molecule is one of them; it is all there is if none can be embedded.
    """
    x = _geometries(molecule, embeddings, seed)
    angles = dihedrals(x, _rigid(molecule, torsions))
    kinds: list[list[int]] = []
    for i in range(len(x)):
        for kind in kinds:
            apart = torch.remainder(angles[i] - angles[kind[0]] + math.pi, 2 * math.pi) - math.pi
            if not len(apart) or float(apart.abs().max()) < SAME:
                kind.append(i)
                break
        else:
            kinds.append([i])
    kinds = sorted(kinds, key=len, reverse=True)[:most]
    share = torch.tensor([float(len(kind)) for kind in kinds], dtype=torch.float64)
    return Templates(x[[kind[0] for kind in kinds]], share / share.sum())


def _geometries(molecule: Molecule, n: int, seed: int) -> Tensor:
    if molecule.start is None:
        return embed(molecule, n, seed, relaxed=True)
    known = rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule.mol)
    start = relax(molecule, molecule.start[None]) if known else molecule.start[None].double()
    try:
        return torch.cat([start, embed(molecule, n, seed, relaxed=True)])
    except TiltflowError:
        return start


def _rigid(molecule: Molecule, torsions: Torsions) -> Tensor:
    """One dihedral of heavy atoms for each bond that is no torsion, and the pyramid of each nitrogen, (R, 4)."""
    mol = molecule.mol
    rotatable = {frozenset(a[1:3]) for a in torsions.atoms.tolist()}
    found = []
    for bond in mol.GetBonds():
        b, c = bond.GetBeginAtom(), bond.GetEndAtom()
        if frozenset((b.GetIdx(), c.GetIdx())) in rotatable:
            continue
        ends = [
            [a.GetIdx() for a in p.GetNeighbors() if a.GetAtomicNum() > 1 and a.GetIdx() != q.GetIdx()]
            for p, q in ((b, c), (c, b))
        ]
        if ends[0] and ends[1]:
            found.append((min(ends[0]), b.GetIdx(), c.GetIdx(), min(ends[1])))
    for atom in mol.GetAtoms():
        near = sorted(a.GetIdx() for a in atom.GetNeighbors())
        if atom.GetAtomicNum() == 7 and len(near) == 3 and atom.IsInRing():
            found.append((near[0], near[1], atom.GetIdx(), near[2]))
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)
