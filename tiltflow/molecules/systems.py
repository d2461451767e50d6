"""What a network sees of molecules: a padded table of graphs with templates, one row per molecule and template.

Sites are the heavy atoms and the hydrogens on N, O and S; other hydrogens are counted at their heavy atom, whose torsions
they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from rdkit import Chem
from torch import Tensor
from torch.nn.functional import pad

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.torsions import Torsions, dihedrals

ELEMENTS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 34, 35, 53)
SHAPES = (Chem.HybridizationType.SP, Chem.HybridizationType.SP2, Chem.HybridizationType.SP3)
LEVELS = (len(ELEMENTS) + 1, 5, 6, len(SHAPES) + 2, 3, 2)
"""Values of each column of ``atoms``: element, hydrogens, neighbours, hybridisation, charge, ring."""
BONDS = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE, Chem.BondType.AROMATIC)
FARTHEST = 5
RELATIONS = len(BONDS) + FARTHEST
"""0: farther than 5 bonds; 1–4: the kinds of bond; then 2, 3, 4, 5 bonds apart."""


class Systems(NamedTuple):
    """S rows, padded to N sites and D torsions.

    atoms (S, N, 6): see :data:`LEVELS`. relations (S, N, N): see :data:`RELATIONS`. sites (S,), torsions (S,): how many are
    real. template (S, N, 3), Å. angles (S, D): the template's. axes (S, D, 2): sites of each bond. moving (S, D, N): sites
    beyond it.
    """

    atoms: Tensor
    relations: Tensor
    sites: Tensor
    torsions: Tensor
    template: Tensor
    angles: Tensor
    axes: Tensor
    moving: Tensor

    def rows(self, system: Tensor, most: int) -> Self:
        """The rows of some systems of at most ``most`` torsions, cut to the widest of them.

        On an accelerator to the widest of all: no step waits for the host.
        """
        n, d = self.atoms.shape[1], min(most, self.angles.shape[1])
        if system.device.type == "cpu":
            n, d = int(self.sites[system].max()), int(self.torsions[system].max())
        return type(self)(
            self.atoms[system, :n],
            self.relations[system, :n, :n],
            self.sites[system],
            self.torsions[system],
            self.template[system, :n],
            self.angles[system, :d],
            self.axes[system, :d],
            self.moving[system, :d, :n],
        )


def systems(triples: Sequence[tuple[Molecule, Torsions, Tensor]]) -> Systems:
    """The table of (molecule, torsions, template (N, 3)), each with a rotatable bond at least.

    Raises:
        TiltflowError: an empty list, a molecule without rotatable bonds.
    """
    if not triples:
        raise TiltflowError("a table of systems needs one at least.")
    rows = [_row(*one) for one in triples]
    n, d = max(int(r.sites) for r in rows), max(int(r.torsions) for r in rows)

    def padded(name: str, *widths: int) -> Tensor:
        return torch.stack([_padded(getattr(r, name), widths) for r in rows])

    return Systems(
        padded("atoms", n, 0),
        padded("relations", n, n),
        padded("sites"),
        padded("torsions"),
        padded("template", n, 0),
        padded("angles", d),
        padded("axes", d, 0),
        padded("moving", d, n),
    )


def _padded(x: Tensor, widths: Sequence[int]) -> Tensor:
    """x with zeros at the end of each axis, up to a width (0: as it is)."""
    room = [w and w - size for w, size in zip(widths, x.shape)]
    return pad(x, [v for extra in reversed(room) for v in (0, extra)])


def _row(molecule: Molecule, torsions: Torsions, template: Tensor) -> Systems:
    """One system, not padded."""
    mol = molecule.mol
    if not len(torsions.atoms):
        raise TiltflowError(f"{molecule.name} ({molecule.smiles}) has no rotatable bond.")
    sites = sites_of(mol)
    place_of = {atom: k for k, atom in enumerate(sites)}
    axes = [[place_of[b], place_of[c]] for _, b, c, _ in torsions.atoms.tolist()]
    return Systems(
        torch.tensor([_atom(mol.GetAtomWithIdx(i)) for i in sites]),
        relations(mol)[sites][:, sites],
        torch.tensor(len(sites)),
        torch.tensor(len(axes)),
        template[sites].float(),
        dihedrals(template[None], torsions.atoms)[0].float(),
        torch.tensor(axes),
        torsions.moving[:, sites],
    )


def sites_of(mol: Chem.Mol) -> list[int]:
    """Heavy atoms and the hydrogens that are not on carbon."""
    return [a.GetIdx() for a in mol.GetAtoms() if a.GetAtomicNum() != 1 or a.GetNeighbors()[0].GetAtomicNum() != 6]


def relations(mol: Chem.Mol) -> Tensor:
    """(N, N) of all atoms, see :data:`RELATIONS`."""
    apart = torch.from_numpy(Chem.GetDistanceMatrix(mol)).long()
    found = torch.where((apart > 1) & (apart <= FARTHEST), len(BONDS) - 1 + apart, 0)
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        found[i, j] = found[j, i] = BONDS.index(bond.GetBondType()) + 1 if bond.GetBondType() in BONDS else 1
    return found


def _atom(atom: Chem.Atom) -> list[int]:
    """The columns of one atom."""
    number, shape = atom.GetAtomicNum(), atom.GetHybridization()
    return [
        ELEMENTS.index(number) + 1 if number in ELEMENTS else 0,
        min(sum(a.GetAtomicNum() == 1 for a in atom.GetNeighbors()), LEVELS[1] - 1),
        min(atom.GetDegree(), LEVELS[2] - 1),
        len(SHAPES) + 1 if atom.GetIsAromatic() else SHAPES.index(shape) + 1 if shape in SHAPES else 0,
        max(-1, min(1, atom.GetFormalCharge())) + 1,
        int(atom.IsInRing()),
    ]
