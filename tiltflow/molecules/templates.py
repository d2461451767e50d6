"""Templates: what torsions leave rigid. Bond lengths, angles and rings come from RDKit's embedding, relaxed with MMFF94."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.audit import label
from tiltflow.molecules.molecule import Molecule, positions_of, with_positions
from tiltflow.molecules.torsions import Torsions, alkynes, dihedrals, linear

RELAXATION = 200
LONGEST = 60
"""Seconds after which RDKit gives up to embed: a cage that cannot exist would keep it busy for hours."""
ROUNDS, COUNT, WINDOW = 6, 24, 6.0
"""Rounds of so many embeddings in which every low state must be found twice; kT below which a state is low."""
GAS = 0.0019872041
"""kcal/mol/K."""
PYRAMIDS = (7, 15, 16, 33, 34)
SAME = math.radians(40)
"""Two geometries are of one kind if none of their rigid dihedrals differs by more."""


def embed(molecule: Molecule, n: int, seed: int, relaxed: bool = False, loose: bool = False) -> Tensor:
    """n conformers of RDKit's ETKDGv3, (n, N, 3) in Å, float64; ``relaxed``: by :func:`relax`, where MMFF94 has parameters.

    ``loose``: from random coordinates and without what crystals prefer, cis amides among them.

    Fewer come back if some embeddings fail. Riniker & Landrum, J. Chem. Inf. Model. 55, 2562, 2015.

    Raises:
        TiltflowError: none could be embedded.
    """
    mol = Chem.Mol(molecule.mol)
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed, parameters.numThreads, parameters.timeout = seed, 1, LONGEST
    if loose:
        parameters.useRandomCoords, parameters.useExpTorsionAnglePrefs, parameters.forceTransAmides = True, False, False
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
    """``positions`` (J, N, 3) in Å; ``share`` (J,): of all embeddings, those of its kind; labels that are not enumerated."""

    positions: Tensor
    share: Tensor
    unsampled: tuple[str, ...] = ()


def templates(molecule: Molecule, torsions: Torsions, most: int, seed: int, embeddings: int = COUNT) -> Templates:
    """The commonest kinds of rigid geometry (:func:`labels`) among relaxed embeddings, at most ``most``.

    A geometry that came with the molecule is one of them; it is all there is if none can be embedded.
    """
    x = _geometries(molecule, embeddings, seed)
    kinds = sorted(_kinds(dihedrals(x, _atoms(labels(molecule, torsions)))), key=len, reverse=True)
    return _templates(x, kinds[:most])


def low_templates(molecule: Molecule, torsions: Torsions, most: int, seed: int, kelvin: float) -> Templates:
    """All kinds of rigid geometry that relax to within 6 kT of the lowest, and the labels of which that cannot be told.

    Embeddings go on, every second round loosely, until each such kind was found by two; mirror images come for nothing
    without chirality. Not enumerated is a label that takes another value in a kind that was found once only, or that is
    beyond the ``most`` lowest; nor a bond that should turn and does neither turn nor belong to a kind.
    """
    named = labels(molecule, torsions)
    x = torch.zeros(0, molecule.mol.GetNumAtoms(), 3, dtype=torch.float64)
    energy = torch.zeros(0, dtype=torch.float64)
    low: list[list[int]] = []
    once: list[list[int]] = []
    for k in range(ROUNDS):
        fresh = _geometries(molecule, COUNT, seed + k, loose=k % 2 == 1)
        x, energy = torch.cat([x, fresh]), torch.cat([energy, _energies(molecule, fresh)])
        n = len(x)
        mirrored = torch.cat([x, -x]) if _achiral(molecule.mol) else x
        kinds = _kinds(dihedrals(mirrored, _atoms(named)))
        lowest = [float(energy[[i % n for i in kind]].min()) for kind in kinds]
        order = sorted(range(len(kinds)), key=lambda j: lowest[j])
        low = [kinds[j] for j in order if lowest[j] <= lowest[order[0]] + WINDOW * GAS * kelvin]
        once = [kind for kind in low if len({i % n for i in kind}) < 2]
        if not named or (k > 0 and not once):
            break
    low = [sorted(kind, key=lambda i: float(energy[i % n])) for kind in low]
    angles = dihedrals(mirrored, _atoms(named))
    left = [kind[0] for kind in [*once, *low[most:]]]
    apart = _apart(angles[left], angles[low[0][0]]) >= SAME
    unknown = [name for (name, _), other in zip(named, apart.any(0).tolist()) if other]
    return _templates(mirrored, low[:most])._replace(unsampled=(*unknown, *_unturned(molecule, torsions)))


def _templates(x: Tensor, kinds: list[list[int]]) -> Templates:
    share = torch.tensor([float(len(kind)) for kind in kinds], dtype=torch.float64)
    return Templates(x[[kind[0] for kind in kinds]], share / share.sum())


def _kinds(angles: Tensor) -> list[list[int]]:
    """Rows of angles (n, R) in groups none of which differs from its first by more than :data:`SAME`."""
    kinds: list[list[int]] = []
    for i in range(len(angles)):
        firsts = angles[[kind[0] for kind in kinds]]
        same = (_apart(firsts, angles[i]) < SAME).all(1).nonzero()[:, 0]
        if len(same):
            kinds[int(same[0])].append(i)
        else:
            kinds.append([i])
    return kinds


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi).abs()


def _achiral(mol: Chem.Mol) -> bool:
    return all(a.GetChiralTag() == Chem.ChiralType.CHI_UNSPECIFIED for a in mol.GetAtoms())


def _energies(molecule: Molecule, x: Tensor) -> Tensor:
    """MMFF94, kcal/mol, (n,); 0 where it has no parameters."""
    mol = with_positions(molecule.mol, x)
    known = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94")
    if known is None:
        return torch.zeros(len(x), dtype=torch.float64)
    fields = (rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, known, confId=i) for i in range(len(x)))
    return torch.tensor([field.CalcEnergy() for field in fields], dtype=torch.float64)


def _geometries(molecule: Molecule, n: int, seed: int, loose: bool = False) -> Tensor:
    if molecule.start is None:
        return embed(molecule, n, seed, relaxed=True, loose=loose)
    known = rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule.mol)
    start = relax(molecule, molecule.start[None]) if known else molecule.start[None].double()
    try:
        return torch.cat([start, embed(molecule, n, seed, relaxed=True, loose=loose)])
    except TiltflowError:
        return start


def _atoms(named: list[tuple[str, tuple[int, ...]]]) -> Tensor:
    return torch.tensor([atoms for _, atoms in named], dtype=torch.long).reshape(-1, 4)


def labels(molecule: Molecule, torsions: Torsions) -> list[tuple[str, tuple[int, ...]]]:
    """What torsions leave rigid and may have several states, each with a dihedral.

    Bonds in rings, of amides, and others that do not turn, the hydrogens of acids and of C=N–H among their ends; pyramids
    of nitrogen in rings or with three different arms, and of phosphorus and sulphur whose stereo is open.
    """
    mol = molecule.mol
    rotatable = {frozenset(a[1:3]) for a in torsions.atoms.tolist()}
    found: list[tuple[str, tuple[int, ...]]] = []
    for bond in mol.GetBonds():
        b, c = bond.GetBeginAtom(), bond.GetEndAtom()
        ends = [_arms(p, q) for p, q in ((b, c), (c, b))]
        if frozenset((b.GetIdx(), c.GetIdx())) not in rotatable and all(ends) and not (linear(b) or linear(c)):
            name = f"{'ring ' if bond.IsInRing() else ''}bond {label(b)}-{label(c)}"
            found.append((name, (min(ends[0]), b.GetIdx(), c.GetIdx(), min(ends[1]))))
    ranks = list(Chem.CanonicalRankAtoms(mol, breakTies=False))
    for atom in mol.GetAtoms():
        near = sorted(a.GetIdx() for a in atom.GetNeighbors())
        if atom.GetAtomicNum() not in PYRAMIDS or len(near) < 3 or atom.GetChiralTag() != Chem.ChiralType.CHI_UNSPECIFIED:
            continue
        ring = atom.GetAtomicNum() == 7 and len(near) == 3 and atom.IsInRing()
        if ring or len({ranks[i] for i in near}) == len(near):
            name = "nitrogen" if atom.GetAtomicNum() == 7 else "centre"
            found.append((f"{name} {label(atom)}", (near[0], near[1], atom.GetIdx(), near[2])))
    return found


def _arms(atom: Chem.Atom, other: Chem.Atom) -> list[int]:
    """Neighbours that measure a dihedral: heavy ones, or a lone hydrogen."""
    near = [a for a in atom.GetNeighbors() if a.GetIdx() != other.GetIdx()]
    heavy = [a.GetIdx() for a in near if a.GetAtomicNum() > 1]
    return heavy or ([near[0].GetIdx()] if len(near) == 1 else [])


def _unturned(molecule: Molecule, torsions: Torsions) -> list[str]:
    """Bonds and alkynes that should turn, as their ends differ from turn to turn, and are neither torsions nor labels."""
    mol = molecule.mol
    known = {frozenset(a[1:3]) for a in torsions.atoms.tolist()}
    known |= {frozenset(atoms[1:3]) for name, atoms in labels(molecule, torsions) if "bond" in name}
    ranks = list(Chem.CanonicalRankAtoms(mol, breakTies=False))

    def turns(p: Chem.Atom, q: Chem.Atom) -> bool:
        near = [ranks[a.GetIdx()] for a in p.GetNeighbors() if a.GetIdx() != q.GetIdx()]
        flat = mol.GetBondBetweenAtoms(p.GetIdx(), q.GetIdx()).GetIsConjugated()
        return bool(near) and not (len({*near}) == 1 and (len(near) == 3 or (len(near) == 2 and flat)))

    found = []
    for bond in mol.GetBonds():
        b, c = bond.GetBeginAtom(), bond.GetEndAtom()
        single = bond.GetBondType() == Chem.BondType.SINGLE and not bond.IsInRing() and not (linear(b) or linear(c))
        if single and turns(b, c) and turns(c, b) and frozenset((b.GetIdx(), c.GetIdx())) not in known:
            found.append(f"bond {label(b)}-{label(c)}")
    lines = [(mol.GetAtomWithIdx(path[0]), mol.GetAtomWithIdx(path[-1])) for path in alkynes(mol)]
    return found + [f"bond {label(b)}-{label(c)}" for b, c in lines if frozenset((b.GetIdx(), c.GetIdx())) not in known]
