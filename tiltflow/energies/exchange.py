r"""Replica exchange along the path from the base to e^{−E}: chains that forget where they began.

    p_β ∝ N(0, scale²)^{1−β} e^{−βE},      0 = β_0 < … < β_R = 1,
    exchange neighbours with probability min(1, exp[(β_r − β_{r+1})(u_r − u_{r+1})]),   u = E + log N(0, scale²)

The lowest rung is drawn anew every time, the others move by MALA with steps spread over two decades, and even and odd pairs
are exchanged in turn (Syed, Bouchard-Côté, Deligiannidis & Doucet 2022, JRSS B 84(2)). Rungs, steps and starts are those of
an annealed population, whose islands know nothing of each other: what islands differ by is the error of every mean. log Z is
the sum of Bennett's ratios (1976, J. Comput. Phys. 22), its error that of leaving out one island at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tiltflow.core.device import double
from tiltflow.core.weights import log_mean_exp
from tiltflow.energies.annealing import Annealed, Blend, Rung, jittered
from tiltflow.energies.evaluator import Evaluator
from tiltflow.energies.problem import EnergyProblem, base_draws

APART, BENNETT = 4, 20
"""Temperatures of annealing from one rung to the next; iterations of Bennett's equation."""


class Exchanged(NamedTuple):
    """What the chains leave at β = 1.

    Args:
        x: (n, *event), state by state of all chains, in the order of time.
        energy: (n,).
        islands: (n,), the island that each chain began in.
        log_z: log Ẑ and its standard error.
        swaps: Share of the exchanges that took place, the worst pair's.
        rungs: How many.
    """

    x: Tensor
    energy: Tensor
    islands: Tensor
    log_z: tuple[float, float]
    swaps: float
    rungs: int


def path(start: Annealed) -> list[Rung]:
    """Every :data:`APART`-th temperature of an annealed population, β = 1 included."""
    return start.rungs[::-1][::APART][::-1]


def exchange(
    problem: EnergyProblem, energy: Evaluator, start: Annealed, rounds: int, moves: int, generator: torch.Generator
) -> Exchanged:
    """Chains from the rows that ``start`` kept, a state of each per round.

    Args:
        problem: What is sampled, and where.
        energy: Its evaluator.
        start: An annealed population with rows kept at every temperature.
        rounds: Exchanges after as many that are thrown away.
        moves: Of MALA between two exchanges.
        generator: Of every draw.
    """
    rungs = path(start)
    beta, steps = (torch.tensor([getattr(r, name) for r in rungs], dtype=torch.float64) for name in ("beta", "step"))
    chains, device = len(rungs[0].x), generator.device
    x = torch.stack([r.x for r in rungs])
    rows = beta.repeat_interleave(chains).to(device, x.dtype)
    widths = steps.repeat_interleave(chains).to(device, x.dtype)
    ladder = torch.cat([beta.new_zeros(1), beta])
    kept, energies, rises = list[Tensor](), list[Tensor](), list[Tensor]()
    swapped, tried, every = torch.zeros(len(beta)), torch.zeros(len(beta)), torch.arange(chains)
    for i in range(2 * rounds):
        moved = jittered(Blend(problem, energy, rows), x.flatten(0, 1), widths, moves, generator, problem).x
        states = torch.cat([base_draws(problem, chains, generator), moved])
        value = energy.value(states)
        rise = double(value + problem.geometry.log_normal(states, problem.scale**2)).view(len(ladder), chains)
        low = torch.arange(i % 2, len(beta), 2)
        gain = (ladder[low] - ladder[low + 1])[:, None] * (rise[low] - rise[low + 1])
        taken = torch.rand(gain.shape, generator=generator, device=device).cpu() < gain.exp()
        source = torch.arange(len(ladder))[:, None].repeat(1, chains)
        source[low] += taken.long()
        source[low + 1] -= taken.long()
        swapped[low] += taken.float().mean(1)
        tried[low] += 1
        chosen = (source * chains + every).to(device)
        x = states[chosen[1:]]
        if i >= rounds:
            kept.append(x[-1])
            energies.append(value[chosen[-1]])
            rises.append(rise[source, every])
    islands = every * len(start.log_z) // chains
    log_z = _log_z(ladder, torch.stack(rises, 1), islands)
    worst = float((swapped / tried.clamp_min(1)).min())
    return Exchanged(torch.cat(kept), torch.cat(energies), islands.repeat(rounds), log_z, worst, len(beta))


def _log_z(ladder: Tensor, rise: Tensor, islands: Tensor) -> tuple[float, float]:
    """log Ẑ and its error from u (R + 1, rounds, chains) at all rungs."""

    def total(some: Tensor) -> float:
        u = rise[..., some].flatten(1)
        pairs = zip(ladder.diff().tolist(), u[:-1], u[1:], strict=True)
        return sum(_log_ratio(-step * below, -step * above) for step, below, above in pairs)

    names = islands.unique()
    without = torch.tensor([total(islands != name) for name in names], dtype=torch.float64)
    return total(islands >= 0), math.sqrt((len(names) - 1) * float(without.var(correction=0)))


def _log_ratio(below: Tensor, above: Tensor) -> float:
    """log Z_1/Z_0 from log p_1/p_0, both unnormalised, at as many draws of p_0 as of p_1."""
    log_r = 0.0
    for _ in range(BENNETT):
        forth, back = (v - functional.softplus(v - log_r) for v in (below, above))
        log_r = log_mean_exp(forth) - log_mean_exp(back - above)
    return log_r
