r"""Sampling e^{−E/kT} in all Cartesian coordinates: from hot to cold by sequential Monte Carlo, with exact weights.

    π_β(x) ∝ e^{−β E(x)},  β = 1/kT from a hot T, at which walkers cross between conformers, to that of the ensemble.

Walkers are moved at the hot temperature until they have forgotten where they began. From one temperature to the next they
are weighted by e^{−(β' − β) E}, resampled, and moved again by kernels that leave π_β invariant: Hamiltonian Monte Carlo of
all atoms, and turns of all atoms beyond a bond by any angle. The next temperature is that at which the weights keep a given
share of effective walkers. The walkers are in groups that know nothing of each other; each has its own estimate of
Z(β)/Z(hot), which is the weight of its walkers, and their spread is the error (P. Del Moral, A. Doucet, A. Jasra, J. R.
Stat. Soc. B 68, 411, 2006; K. Hukushima, Y. Iba, AIP Conf. Proc. 690, 200, 2003).

E does not change when a molecule is moved as a whole, nor do the kernels care about it: averages over internal coordinates
are those of the ensemble in all coordinates, with symmetric and mirror images in their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess
from tiltflow.molecules.energies import MolecularEnergy, kt_per
from tiltflow.molecules.settings import AnnealedSettings
from tiltflow.molecules.torsions import Torsions, rotated

ACCEPTED = 0.8
"""Of Hamiltonian moves, by their step."""


class Annealed(NamedTuple):
    """Walkers (P, N, 3) in Å, their E (P,) in the energy's unit, log weights (P,) and groups (P,).

    ``hot``: where they were before and after the moves at the hot temperature, (2, P, N, 3); ``temperatures``: how many;
    ``energy_calls``: rows.
    """

    positions: Tensor
    energy: Tensor
    log_weights: Tensor
    group: Tensor
    hot: Tensor
    temperatures: int
    energy_calls: int


@dataclass
class _Walkers:
    """Positions, E − zero in kcal-like units of the energy, forces; and how they move at ``beta``, in 1/unit."""

    provider: MolecularEnergy
    torsions: Torsions
    generator: torch.Generator
    x: Tensor
    zero: float
    beta: float
    step: float
    calls: int = 0

    def __post_init__(self) -> None:
        self.energy, self.forces = self.at(self.x)
        if not bool(self.energy.isfinite().all()):
            raise TiltflowError(f"{self.provider.name} is not finite at an embedding of the molecule; use another energy.")

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += len(x)
        energy, forces = self.provider.energy_and_forces(x)
        return (energy.double() - self.zero).to(x.device), forces.to(x)

    def take(self, rows: Tensor) -> None:
        self.x, self.energy, self.forces = self.x[rows], self.energy[rows], self.forces[rows]

    def move(self, leaps: int, turns: int) -> None:
        """One Hamiltonian trajectory and so many turns, each accepted or not."""
        self.leap(leaps)
        for _ in range(turns if len(self.torsions.atoms) else 0):
            self.turn()

    def leap(self, leaps: int) -> None:
        p = self._normal(self.x)
        step = self.step * (0.8 + 0.4 * float(torch.rand((), generator=self.generator, device=self.x.device)))
        kinetic = (p * p).flatten(1).sum(1).double() / 2
        x, forces, energy = self.x, self.forces, self.energy
        p = p + step / 2 * self.beta * forces
        for k in range(leaps):
            x = x + step * p
            energy, forces = self.at(x)
            p = p + (step if k < leaps - 1 else step / 2) * self.beta * forces
        change = self.beta * (energy - self.energy) + (p * p).flatten(1).sum(1).double() / 2 - kinetic
        taken = self._accept(x, energy, forces, change)
        self.step *= math.exp(0.3 * (taken - ACCEPTED))

    def turn(self) -> None:
        """All atoms beyond one bond of each walker, by any angle."""
        n, device = len(self.x), self.x.device
        which = torch.randint(len(self.torsions.atoms), (n,), generator=self.generator, device=device)
        angle = (2 * torch.rand(n, generator=self.generator, device=device) - 1).to(self.x) * math.pi
        rows = torch.arange(n, device=device)
        b, c = (self.x[rows, self.torsions.atoms.to(device)[which, k]] for k in (1, 2))
        moving = self.torsions.moving.to(device)[which][..., None]
        x = torch.where(moving, rotated(self.x, b, c, angle), self.x)
        energy, forces = self.at(x)
        self._accept(x, energy, forces, self.beta * (energy - self.energy))

    def _accept(self, x: Tensor, energy: Tensor, forces: Tensor, change: Tensor) -> float:
        """By Metropolis; NaN is refused. The share that was accepted."""
        uniform = torch.rand(len(x), generator=self.generator, device=x.device, dtype=torch.float64)
        taken = uniform.log() < -change
        self.energy = torch.where(taken, energy, self.energy)
        self.x, self.forces = (torch.where(taken[:, None, None], a, b) for a, b in ((x, self.x), (forces, self.forces)))
        return float(taken.double().mean())

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)


def anneal(
    energy: MolecularEnergy,
    torsions: Torsions,
    rings: bool,
    starts: Tensor,
    kelvin: float,
    settings: AnnealedSettings,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda kelvin: None,
) -> Annealed:
    """As many walkers as starts (P, N, 3), P a multiple of the groups.

    Args:
        torsions: bonds about which they turn. rings: some pucker.

    Raises:
        TiltflowError: the energy is not finite at a start.
    """
    x = starts.float().to(generator.device)
    zero = float(energy.energy_and_forces(starts[:1])[0])
    last = kt_per(energy.unit, kelvin)
    kelvin_of_start, moves = settings.of(rings)
    beta = min(last, kt_per(energy.unit, kelvin_of_start))
    walkers = _Walkers(energy, torsions, generator, x, zero, beta, 0.02)
    for _ in range(moves):
        walkers.move(settings.leaps, settings.turns)
    hot = torch.stack([x, walkers.x])
    log_z, count = x.new_zeros(settings.groups, dtype=torch.float64), 1
    while beta < last:
        ahead = _next(walkers.energy, beta, last, settings.kept)
        increments = (-(ahead - beta) * walkers.energy).reshape(settings.groups, -1)
        log_z = log_z + increments.logsumexp(1) - math.log(increments.shape[1])
        walkers.take(_resampled(increments, generator))
        walkers.step *= math.sqrt(beta / ahead)
        beta = walkers.beta = ahead
        count += 1
        progress(kelvin * last / beta)
        for _ in range(settings.moves if beta < last else settings.last_moves):
            walkers.move(settings.leaps, settings.turns)
    group = torch.arange(settings.groups, device=x.device).repeat_interleave(len(x) // settings.groups)
    final = walkers.x.double()
    value = energy.energy_and_forces(final)[0].double().to(x.device)
    return Annealed(final, value, log_z[group] - log_z.max(), group, hot.double(), count, walkers.calls)


def _next(energy: Tensor, beta: float, last: float, kept: float) -> float:
    """The largest β ≤ last at which e^{−(β − beta) E} keeps a share of effective walkers, by bisection."""
    if ess(-(last - beta) * energy) >= kept:
        return last
    low, high = beta, last
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(-(middle - beta) * energy) >= kept else (low, middle)
    return low


def _resampled(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Rows drawn within each group (G, M) by their weights, systematically: (G·M,)."""
    groups, size = log_w.shape
    edges = log_w.softmax(1).cumsum(1)
    shift = torch.rand(groups, 1, generator=generator, device=log_w.device, dtype=log_w.dtype)
    points = (torch.arange(size, device=log_w.device) + shift) / size
    rows = torch.searchsorted(edges, points).clamp_max(size - 1)
    return (rows + size * torch.arange(groups, device=log_w.device)[:, None]).flatten()
