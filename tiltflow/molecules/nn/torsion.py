r"""A network for the torsions of any molecule: forces on its atoms, turned into torques about its bonds.

At angles θ (B, D) of system s the sites are at x(θ) (see :mod:`tiltflow.molecules.torsions`). A message-passing network on
all pairs of sites, as in :mod:`tiltflow.nn.particles` with atoms and bonds added, gives a field f_i = Σ_j u_ij φ_ij on them,
and the field of the torsions is its torque about each bond axis n_k through c_k,

    τ_k = Σ_{i beyond k} (n_k × (x_i − c_k)) · f_i / √(Σ_{i beyond k} ‖n_k × (x_i − c_k)‖²),

which is what a force field does: ∂x_i/∂θ_k = n_k × (x_i − c_k). It sees x through distances, so τ does not depend on how the
molecule lies, and changes sign with its mirror image. Jing et al. 2022 (arXiv:2206.01729) score torsions with a tensor
product instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tiltflow.core.device import beside
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.systems import LEVELS, RELATIONS, Systems
from tiltflow.molecules.torsions import rotated
from tiltflow.nn.features import time_features
from tiltflow.nn.particles import BLOCK, Radial

SHORTEST, LONGEST = 1.0, 12.0
"""Å: distances told apart."""


def place_sites(rows: Systems, angles: Tensor) -> Tensor:
    """x(θ), (B, N, 3), of the sites of one system per row at angles (B, D)."""
    x, turn = rows.template.to(angles), angles - rows.angles.to(angles)
    every = torch.arange(len(angles), device=angles.device)
    for k in range(angles.shape[1]):
        b, c = x[every, rows.axes[:, k, 0]], x[every, rows.axes[:, k, 1]]
        x = torch.where(rows.moving[:, k, :, None], rotated(x, b, c, turn[:, k]), x)
    return x


def torques(rows: Systems, x: Tensor, force: Tensor) -> Tensor:
    """τ, (B, D), of forces (B, N, 3) at x (B, N, 3); 0 where a torsion is padding."""
    every = torch.arange(len(x), device=x.device)[:, None]
    b, c = x[every, rows.axes[..., 0]], x[every, rows.axes[..., 1]]
    axis = nn.functional.normalize(c - b, dim=-1, eps=1e-6)[:, :, None]
    lever = torch.linalg.cross(axis.expand(-1, -1, x.shape[1], -1), x[:, None] - c[:, :, None]) * rows.moving[..., None]
    size = (lever * lever).sum((2, 3)).clamp_min(1e-6).sqrt()
    return (lever * force[:, None]).sum((2, 3)) / size


@lru_cache(maxsize=64)
def _pairs(sites: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(sites, sites, 1, device=device)
    return first.clone(), second.clone()


class PairLayer(nn.Module):
    """One round of symmetric messages between sites; pushes along the pairs, and new states of the sites."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.node = nn.Linear(hidden, hidden, bias=False)
        self.radial = nn.Linear(features, hidden, bias=False)
        self.message = nn.Linear(hidden, hidden)
        self.push = nn.Linear(hidden, 1, bias=False)
        self.own = nn.Linear(hidden, hidden, bias=False)
        self.received = nn.Linear(hidden, hidden)
        self.update = nn.Linear(hidden, hidden)

    def forward(
        self, h: Tensor, features: Tensor, pairs: tuple[Tensor, Tensor], real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h (N, B, H), features (P, B, F) of pairs of sites (P,), real (P, B) → pushes (P, B, 1) and h."""
        first, second = pairs
        a = self.node(h)
        z = self.radial(features).add_(a.index_select(0, first)).add_(a.index_select(0, second))
        m = silu(self.message(silu(z)))
        m = m if real is None else m * real[..., None]
        total = torch.zeros_like(h).index_add(0, first, m).index_add(0, second, m) / 4
        h = h + self.update(silu(self.received(total) + self.own(h)))
        return self.push(m), h


class TorsionNet(nn.Module):
    """(angles (B, D), t (B,), system (B,)) → the field of the torsions (B, D); starts at exactly zero.

    Args:
        systems: the table that ``system`` counts in. It is not a weight: set :attr:`systems` for other molecules.
        hidden, layers: of the network. basis: radial functions.
        noise: h(t), (B,) → (B,), standard deviation of the noise of an angle that is left at t.
    """

    def __init__(
        self,
        systems: Systems | None,
        hidden: int = 64,
        layers: int = 3,
        basis: int = 24,
        noise: Callable[[Tensor], Tensor] | None = None,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        self.systems, self.noise, self.frequencies, self.hidden = systems, noise, frequencies, hidden
        self.radial = Radial(basis, (SHORTEST, LONGEST), noisy=False)
        self.columns = nn.ModuleList(nn.Embedding(n, hidden) for n in LEVELS)
        times = 1 + 2 * frequencies + (noise is not None)
        self.time = nn.Sequential(nn.Linear(times, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.layers = nn.ModuleList(PairLayer(len(self.radial.centre) + RELATIONS, hidden) for _ in range(layers))
        for layer in self.layers:
            assert isinstance(layer, PairLayer)
            nn.init.zeros_(layer.push.weight)

    def forward(self, x: Tensor, t: Tensor, system: Tensor) -> Tensor:
        """The field (B, D) of angles (B, D); zero where D is padding."""
        if self.systems is None:
            raise TiltflowError("this network has been told no molecules yet: set its attribute `systems`.")
        if x.device.type != "cpu":
            return self._field(Systems(*(beside(v, x) for v in self.systems)), x, t, system)
        sizes = self.systems.sites[system]
        order = torch.argsort(sizes * len(self.systems.sites) + system)  # alike ones together: little padding
        widest = int(sizes.max())
        blocks = order.split(max(1, BLOCK // (self.hidden * widest * widest // 2)))
        field = torch.cat([self._field(self.systems, x[b], t[b], system[b]) for b in blocks])
        return torch.zeros_like(field).index_copy(0, order, field)

    def _field(self, systems: Systems, x: Tensor, t: Tensor, system: Tensor) -> Tensor:
        """The field of one block."""
        rows = systems.rows(system, x.shape[1])
        d = rows.angles.shape[1]
        sites = place_sites(rows, x[:, :d])
        field = torques(rows, sites, self._force(rows, sites, t))
        return nn.functional.pad(field, (0, x.shape[1] - d))

    def _force(self, rows: Systems, x: Tensor, t: Tensor) -> Tensor:
        """f (B, N, 3)."""
        first, second = _pairs(x.shape[1], x.device)
        features = time_features(t, self.frequencies)
        if self.noise is not None:
            features = torch.cat([features, self.noise(t).log()[:, None]], 1)
        atoms = sum(column(rows.atoms[..., k]) for k, column in enumerate(self.columns))
        h = (atoms + self.time(features)[:, None]).transpose(0, 1)
        real = (second[:, None] < rows.sites).to(x)
        difference = (x[:, first] - x[:, second]).transpose(0, 1)
        squared = (difference * difference).sum(-1)
        unit = difference * (squared + SHORTEST**2).rsqrt()[..., None]
        relation = nn.functional.one_hot(rows.relations.permute(1, 2, 0)[first, second], RELATIONS)
        pairs = torch.cat([self.radial(squared, None), relation.to(x)], -1)
        push = torch.zeros_like(squared)[..., None]
        for layer in self.layers:
            one, h = layer(h, pairs, (first, second), real)
            push = push + one
        along = unit * push * real[..., None]
        force = x.new_zeros(x.shape[1], len(x), 3)
        return (force.index_add(0, first, along) - force.index_add(0, second, along)).transpose(0, 1)
