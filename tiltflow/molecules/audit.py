"""Is a conformer still the molecule that was asked for? Bonds and stereochemistry, recomputed from the 3-D coordinates.

Bonds are read from distances and covalent radii r (Å): a bond must be between 0.6 (r_i + r_j) and r_i + r_j + 0.4, any other
pair of atoms further apart than r_i + r_j + 0.25 (bridgeheads of a cage may be closer than the ends of a stretched bond,
hence two limits). Chirality and E/Z are assigned by RDKit to a copy, from its coordinates alone.
"""

from __future__ import annotations

import torch
from rdkit import Chem
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule, with_positions

SHORTEST, BROKEN, FORMED = 0.6, 0.4, 0.25
_ROWS = 256  # conformers whose distances are held at a time
_STEREO = {
    Chem.BondStereo.STEREOE: "E",
    Chem.BondStereo.STEREOZ: "Z",
    Chem.BondStereo.STEREOTRANS: "trans",
    Chem.BondStereo.STEREOCIS: "cis",
}


def audit(molecule: Molecule, positions: Tensor) -> list[str | None]:
    """What is wrong with each conformer, or None: coordinates not finite, bonds, chirality of centres, E/Z of double bonds.

    Args:
        molecule: what the conformers should be.
        positions: (n, N, 3), Å, atoms in the order of ``molecule.mol``.

    Atoms are named by symbol and number, counted from 1 as in an .sdf. Every centre and double bond whose stereo the input
    defines is compared, also in rings; axial and planar chirality are not looked at.

    Raises:
        TiltflowError: positions of another shape.
    """
    atoms = molecule.mol.GetNumAtoms()
    if positions.ndim != 3 or positions.shape[1:] != (atoms, 3):
        raise TiltflowError(f"{molecule.name}: positions are {tuple(positions.shape)}; they must be (n, {atoms}, 3), in Å.")
    found: list[str | None] = []
    for rows in positions.detach().cpu().double().split(_ROWS):
        finite = torch.isfinite(rows).flatten(1).all(1)
        good = iter(zip(_connectivity(molecule.mol, rows[finite]), _stereo(molecule.mol, rows[finite])))
        for fine in finite.tolist():
            bonds, stereo = next(good) if fine else (["coordinates are not finite"], [])
            found.append("; ".join([*bonds, *stereo]) or None)
    return found


def _connectivity(mol: Chem.Mol, x: Tensor) -> list[list[str]]:
    """The first wrong bond of each kind in each conformer (n, N, 3)."""
    table = Chem.GetPeriodicTable()
    radius = torch.tensor([table.GetRcovalent(a.GetAtomicNum()) for a in mol.GetAtoms()], dtype=torch.float64)
    bonded = torch.from_numpy(Chem.GetAdjacencyMatrix(mol)).bool()
    touch, pairs = radius + radius[:, None], torch.ones_like(bonded).triu(1)
    d = (x[:, :, None] - x[:, None]).norm(dim=-1)
    kinds = (
        ("is broken", bonded & (d > touch + BROKEN)),
        ("is too short", bonded & (d < SHORTEST * touch)),
        ("is no bond", ~bonded & (d < touch + FORMED)),
    )
    faults: list[list[str]] = [[] for _ in x]
    for text, wrong in kinds:
        wrong = wrong & pairs
        for row in wrong.flatten(1).any(1).nonzero()[:, 0].tolist():
            i, j = wrong[row].nonzero()[0].tolist()
            ends = "-".join(label(mol.GetAtomWithIdx(k)) for k in (i, j))
            more = int(wrong[row].sum()) - 1
            faults[row].append(f"{ends} {text} ({float(d[row, i, j]):.2f} Å)" + (f" and {more} more" if more else ""))
    return faults


def _stereo(mol: Chem.Mol, x: Tensor) -> list[list[str]]:
    """Centres and double bonds of each conformer (n, N, 3) that differ from the input's."""
    centres = [(a, a.GetChiralTag()) for a in mol.GetAtoms() if a.GetChiralTag() != Chem.ChiralType.CHI_UNSPECIFIED]
    bonds = [(b, b.GetStereo()) for b in mol.GetBonds() if b.GetStereo() in _STEREO]
    faults: list[list[str]] = [[] for _ in x]
    for row, wrong in zip(x, faults) if centres or bonds else ():
        copy = with_positions(mol, row[None])
        Chem.AssignStereochemistryFrom3D(copy, 0, replaceExistingTags=True)
        for atom, tag in centres:
            now = copy.GetAtomWithIdx(atom.GetIdx()).GetChiralTag()
            if now != tag:
                lost = now == Chem.ChiralType.CHI_UNSPECIFIED
                wrong.append(f"centre {label(atom)} {'has no chirality' if lost else 'is inverted'}")
        for bond, stereo in bonds:
            new = copy.GetBondWithIdx(bond.GetIdx()).GetStereo()
            if new != stereo:
                ends = f"{label(bond.GetBeginAtom())}={label(bond.GetEndAtom())}"
                wrong.append(f"double bond {ends} is {_STEREO.get(new, 'undefined')}, not {_STEREO[stereo]}")
    return faults


def label(atom: Chem.Atom) -> str:
    """Symbol and number, counted from 1 as in an .sdf."""
    return f"{atom.GetSymbol()}{atom.GetIdx() + 1}"
