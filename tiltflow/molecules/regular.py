r"""What keeps a molecule what it is: penalties that are zero, with zero gradient, wherever its geometry is sound.

With lengths d of bonds, volumes V = (a × b)·c of three arms of each stereocentre and p = (r_1 × r)·(r × r_2) of the bonds
r_1, r, r_2 in a row at each double bond r of defined E/Z, all relative to an embedding of RDKit (d°, V°, p°),

    U/kT = ½ k_d Σ max(0, |d − d°| − w)² + ½ k_s Σ max(0, m − V/V°)² + ½ k_s Σ max(0, m − p/p°)².

The bond term is that of Adjoint Sampling (Havens et al. 2025, arXiv:2504.11713) with a flat bottom, so that e^{−E/kT} is
untouched where the molecule is whole; the others take the place of what a force field does not know: E is the same for a
mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rdkit import Chem
from torch import Tensor

from tiltflow.molecules.molecule import Molecule


def stereocentres(molecule: Molecule) -> Tensor:
    """(C, 4): each centre with defined chirality and three of its neighbours."""
    centres = [a for a in molecule.mol.GetAtoms() if a.GetChiralTag() != Chem.ChiralType.CHI_UNSPECIFIED]
    found = [[a.GetIdx(), *sorted(b.GetIdx() for b in a.GetNeighbors())[:3]] for a in centres]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)


def double_bonds(molecule: Molecule) -> Tensor:
    """(E, 4): the dihedral of each double bond with defined E/Z."""
    bonds = [b for b in molecule.mol.GetBonds() if len(b.GetStereoAtoms()) == 2]
    found = [[b.GetStereoAtoms()[0], b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetStereoAtoms()[1]] for b in bonds]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)


def bonds_of(molecule: Molecule) -> Tensor:
    """(M, 2)."""
    return torch.tensor([[b.GetBeginAtomIdx(), b.GetEndAtomIdx()] for b in molecule.mol.GetBonds()]).reshape(-1, 2)


def volumes(x: Tensor, centres: Tensor) -> Tensor:
    """V, (B, C), Å³: odd under reflection."""
    arms = x[:, centres[:, 1:]] - x[:, centres[:, :1]]
    return (torch.linalg.cross(arms[:, :, 0], arms[:, :, 1]) * arms[:, :, 2]).sum(-1)


def twists(x: Tensor, bonds: Tensor) -> Tensor:
    """p, (B, E), Å⁴: of one sign for cis, the other for trans."""
    one, middle, two = x[:, bonds[:, 1:]].sub(x[:, bonds[:, :-1]]).unbind(2)
    return (torch.linalg.cross(one, middle) * torch.linalg.cross(middle, two)).sum(-1)


@dataclass(frozen=True)
class Regulariser:
    """U/kT of positions (B, N, 3), differentiable.

    Args:
        bonds, centres, doubles: see :func:`bonds_of`, :func:`stereocentres`, :func:`double_bonds`.
        lengths (M,), volumes (C,), twists (E,): d°, V°, p°.
        stiffness: k_d in 1/Å². slack: w in Å. stereo, margin: k_s and m; k_s = 100 leaves E/kT + U a minimum at the mirror
            image of a centre.
    """

    bonds: Tensor
    centres: Tensor
    doubles: Tensor
    lengths: Tensor
    volumes: Tensor
    twists: Tensor
    stiffness: float = 100.0
    slack: float = 0.25
    stereo: float = 500.0
    margin: float = 0.2

    def __call__(self, x: Tensor) -> Tensor:
        d = (x[:, self.bonds[:, 0]] - x[:, self.bonds[:, 1]]).norm(dim=-1)
        stretched = ((d - self.lengths.to(x)).abs() - self.slack).clamp_min(0)
        inverted = (self.margin - volumes(x, self.centres) / self.volumes.to(x)).clamp_min(0)
        turned = (self.margin - twists(x, self.doubles) / self.twists.to(x)).clamp_min(0)
        stereo = (inverted**2).sum(1) + (turned**2).sum(1)
        return 0.5 * (self.stiffness * (stretched**2).sum(1) + self.stereo * stereo)


def regulariser(molecule: Molecule, reference: Tensor) -> Regulariser:
    """That of a molecule, relative to a sound geometry (N, 3) of it."""
    bonds, centres, doubles = bonds_of(molecule), stereocentres(molecule), double_bonds(molecule)
    x = reference[None].double()
    lengths = (x[0, bonds[:, 0]] - x[0, bonds[:, 1]]).norm(dim=-1)
    return Regulariser(bonds, centres, doubles, lengths, volumes(x, centres)[0], twists(x, doubles)[0])
