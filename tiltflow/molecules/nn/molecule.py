r"""A network for all atoms of one molecule: a field that turns and shifts with it, has no mean, and knows its handedness.

With noise of standard deviation h(t) still to come, a field f says that the end point is y = x + h f. Each layer ℓ looks at
the end point that the layers before it predict, and corrects it: with y⁰ = x and f⁰ = 0,

    f_i ← f_i + Σ_j u_ij (φ_ij + a(t) z_ij) + Σ_c γ_c ∂V_c/∂y_i,    z = (d − d°) h/(h² + s²),    y ← x + h f,

where distances d and directions u are those of y. The pushes φ_ij come from messages as in :mod:`~.torsion`.
Bonds and angles are stiff and what they should be is known: pairs at most two bonds apart have a spring of learned strength
a(t), with what a Gaussian distance of width s asks for. V_c is the signed volume of stereocentre c
(:mod:`tiltflow.molecules.regular`), whose ratio to its reference enters the state of the centre: the only thing here that a
mirror image changes. Pairs are those at most three bonds apart, and all of heavy atoms and of hydrogens not on carbon.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rdkit import Chem
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.nn.torsion import PairLayer
from tiltflow.molecules.regular import stereocentres, volumes
from tiltflow.molecules.systems import RELATIONS, relations, sites_of
from tiltflow.nn.features import time_features
from tiltflow.nn.particles import BLOCK, Radial, zeroed

SHORTEST, LONGEST = 0.5, 12.0
"""Å: distances told apart."""
WIDTH = 0.07
"""s, in Å: of bonds, and of distances across an angle."""


class MoleculeNet(nn.Module):
    """(x (B, N, 3), t (B,)) → field (B, N, 3); starts at exactly zero. See the module's equations.

    Args:
        molecule: whose atoms. reference: a sound geometry (N, 3) of it, in Å.
        noise: h(t), (B,) → (B,), Å: standard deviation per coordinate of the noise left at t.
        hidden, layers: of the network. basis: radial functions.
    """

    def __init__(
        self,
        molecule: Molecule,
        reference: Tensor,
        noise: Callable[[Tensor], Tensor],
        hidden: int = 32,
        layers: int = 3,
        basis: int = 16,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        mol, self.noise, self.frequencies = molecule.mol, noise, frequencies
        table = relations(mol)
        site = torch.zeros(len(table), dtype=torch.bool)
        site[sites_of(mol)] = True
        near = torch.from_numpy(Chem.GetDistanceMatrix(mol)) <= 3
        first, second = ((site & site[:, None]) | near).triu(1).nonzero().unbind(1)
        ranks = torch.tensor(list(Chem.CanonicalRankAtoms(mol, breakTies=False)))
        kind = torch.unique(ranks, return_inverse=True)[1]
        centres, x = stereocentres(molecule), reference[None].double()
        constants = {
            "kind": kind, "first": first, "second": second, "relation": table[first, second], "centres": centres,
            "length": (x[0, first] - x[0, second]).norm(dim=-1)[:, None],
            "stiff": (torch.from_numpy(Chem.GetDistanceMatrix(mol))[first, second] <= 2)[:, None],
            "volume": volumes(x, centres)[0],
        }  # fmt: skip
        for name, value in constants.items():
            value = value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            self.register_buffer(name, value.clone(), persistent=False)
        self.kind: Tensor
        self.first: Tensor
        self.second: Tensor
        self.relation: Tensor
        self.centres: Tensor
        self.length: Tensor
        self.stiff: Tensor
        self.volume: Tensor
        self.radial = Radial(basis, (SHORTEST, LONGEST), noisy=False)
        self.atoms = nn.Embedding(int(kind.max()) + 1, hidden)
        times = 2 + 2 * frequencies
        self.time = nn.Sequential(nn.Linear(times, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.springs = nn.ModuleList(zeroed(nn.Linear(times, RELATIONS)) for _ in range(layers))
        self.hand = nn.Linear(1, hidden, bias=False)
        self.inversions = nn.ModuleList(zeroed(nn.Linear(hidden, 1)) for _ in range(layers))
        self.layers = nn.ModuleList(PairLayer(len(self.radial.centre) + RELATIONS + 1, hidden) for _ in range(layers))
        for layer in self.layers:
            assert isinstance(layer, PairLayer)
            nn.init.zeros_(layer.push.weight)
        self.block = max(1, BLOCK // (hidden * len(first)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field (B, N, 3).

        Raises:
            TiltflowError: x is not (B, N, 3).
        """
        if x.shape[1:] != (len(self.kind), 3):
            raise TiltflowError(f"x has shape {tuple(x.shape)}; this network takes (B, {len(self.kind)}, 3).")
        blocks = -(-len(x) // self.block)
        return torch.cat([self._field(*part) for part in zip(x.tensor_split(blocks), t.tensor_split(blocks))])

    def _field(self, x: Tensor, t: Tensor) -> Tensor:
        """The field of one block."""
        left = self.noise(t)
        features = torch.cat([time_features(t, self.frequencies), left.log()[:, None]], 1)
        x = x.transpose(0, 1)
        y, force = x, torch.zeros_like(x)
        h = self.atoms(self.kind)[:, None] + self.time(features)
        stiff = left / (left**2 + WIDTH**2) * self.stiff
        relation = nn.functional.one_hot(self.relation, RELATIONS).to(x)[:, None].expand(-1, x.shape[1], -1)
        for layer, spring, invert in zip(self.layers, self.springs, self.inversions):
            difference = y[self.first] - y[self.second]
            squared = (difference * difference).sum(-1)
            z = ((squared + 1e-12).sqrt() - self.length) * stiff
            pairs = torch.cat([self.radial(squared, None), torch.tanh(z)[..., None], relation], -1)
            volume, normals = self._hands(y)
            h = h.index_add(0, self.centres[:, 0], self.hand(torch.tanh(volume)[..., None]))
            push, h = layer(h, pairs, (self.first, self.second))
            push = push + (spring(features).T[self.relation] * z)[..., None]
            along = difference * (squared + 0.1 * SHORTEST**2).rsqrt()[..., None] * push
            force = force.index_add(0, self.first, along).index_add(0, self.second, -along)
            turn = invert(h[self.centres[:, 0]])
            for k, normal in enumerate(normals):
                force = force.index_add(0, self.centres[:, k + 1], turn * normal)
                force = force.index_add(0, self.centres[:, 0], -turn * normal)
            y = x + left[:, None] * force
        return force.transpose(0, 1)

    def _hands(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """V/V° (C, B) of y (N, B, 3), and its gradient at the three neighbours, bounded, each (C, B, 3)."""
        a, b, c = (y[self.centres[:, k]] - y[self.centres[:, 0]] for k in (1, 2, 3))
        normals = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
        volume = (a * normals[0]).sum(-1) / self.volume[:, None]
        sign = self.volume.sign()[:, None, None]
        return volume, [sign * n * (1 + (n * n).sum(-1, keepdim=True)).rsqrt() for n in normals]
