r"""A population that is annealed from the base to e^{−E}: sequential Monte Carlo.

    p_β ∝ N(0, scale²)^{1−β} e^{−βE},   0 = β_0 < … < β_T = 1,
    log Ẑ = Σ_t log mean exp(−(β_{t+1} − β_t)(E + log N(0, scale²)))

Each β is the largest whose incremental weights are worth half of the population; then it is resampled and moved by MALA,
whose step is spread over two decades (no single one suits a funnel) and adapted. Several islands resample apart: what their
log Z differ by is its standard error. Del Moral, Doucet & Jasra 2006, JRSS B 68(3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess, log_mean_exp, systematic
from tiltflow.energies.evaluator import Energy, Evaluator
from tiltflow.energies.mcmc import ACCEPTANCE, Polished, mala
from tiltflow.energies.problem import EnergyProblem, base_draws

WORTH, SPREAD, MOST = 0.9, 2.0, 5_000
"""ESS of incremental weights; decades that steps are spread over; temperatures at most."""


class Rung(NamedTuple):
    """β, the step of MALA there, and rows that are kept, as many of every island, island by island."""

    beta: float
    step: float
    x: Tensor


class Annealed(NamedTuple):
    """What is left at β = 1.

    Args:
        x: (islands · size, *event), equally weighted, island by island.
        log_z: log Ẑ of each island, (islands,).
        step: The step of MALA that was adapted to.
        rungs: The temperatures after the first, T of them.
    """

    x: Tensor
    log_z: Tensor
    step: float
    rungs: list[Rung]

    @property
    def evidence(self) -> tuple[float, float]:
        """log Ẑ of all islands together, and its standard error."""
        error = (self.log_z - self.log_z.max()).exp()
        return log_mean_exp(self.log_z), float(error.std() / error.mean()) / math.sqrt(len(error))


def anneal(
    problem: EnergyProblem,
    energy: Evaluator,
    islands: int,
    size: int,
    moves: int,
    generator: torch.Generator,
    tell: Callable[[float], None] = lambda beta: None,
    keep: int = 0,
) -> Annealed:
    """Anneal islands · size draws of N(0, scale²).

    Args:
        problem: What is sampled, and where.
        energy: Its evaluator.
        islands: Populations that resample apart, at least 2.
        size: Draws of each.
        moves: Of MALA at each temperature.
        generator: Of every draw.
        tell: Told β.
        keep: Rows of every island that each rung keeps, at most ``size``.

    Raises:
        TiltflowError: an island that lost all its draws, or a population that does not get to β = 1.
    """
    geometry, variance = problem.geometry, problem.scale**2
    x = base_draws(problem, islands * size, generator)
    log_step, beta, log_z = math.log(variance), 0.0, torch.zeros(islands, dtype=torch.float64)
    rungs = list[Rung]()
    some = (torch.arange(islands)[:, None] * size + torch.arange(keep) * size // max(keep, 1)).flatten()
    for _ in range(MOST):
        rise = double(energy.value(x) + geometry.log_normal(x, variance))
        step = _next(rise, 1 - beta)
        log_w = (-step * rise).view(islands, size)
        log_z += torch.tensor([log_mean_exp(row) for row in log_w])
        if not bool(log_z.isfinite().all()):
            raise TiltflowError(
                f"no draw of N(0, {problem.scale:g}²) has a finite energy on one of {islands} islands of {size}: give a "
                "scale that covers the target, or more particles."
            )
        chosen = torch.cat([i * size + systematic(row, generator) for i, row in enumerate(log_w)])
        x, beta = x[chosen.to(x.device)], min(1.0, beta + step)
        moved = jittered(Blend(problem, energy, beta), x, math.exp(log_step), moves, generator, problem)
        x, log_step = moved.x, log_step + 2 * (moved.acceptance - ACCEPTANCE)
        rungs.append(Rung(beta, math.exp(log_step), x[some]))
        tell(beta)
        if beta == 1:
            return Annealed(x, log_z, math.exp(log_step), rungs)
    raise TiltflowError(f"β reached {beta:.3g} in {MOST} temperatures: the energy is too rough for draws of N(0, scale²).")


def quenched(
    problem: EnergyProblem, energy: Evaluator, n: int, moves: int, generator: torch.Generator, parts: int = 40
) -> Tensor:
    """n draws of N(0, scale²) after so many moves at β = 1, in ``parts``: each falls into a mode near it, heavy or light."""
    x, log_step = base_draws(problem, n, generator), 2 * math.log(problem.finest)
    x = x[energy.value(x).isfinite()]
    for _ in range(min(parts, moves)):
        moved = jittered(energy, x, math.exp(log_step), max(1, moves // parts), generator, problem)
        x, log_step = moved.x, log_step + 2 * (moved.acceptance - ACCEPTANCE)
    return x


def jittered(
    energy: Energy, x: Tensor, step: float | Tensor, moves: int, generator: torch.Generator, problem: EnergyProblem
) -> Polished:
    """Moves of MALA, every row at its own step: the given one, or up to two decades below."""
    below = 10 ** (-SPREAD * torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device))
    return mala(energy, x, step * below, moves, generator, problem.geometry)


def _next(rise: Tensor, left: float) -> float:
    """The largest increment of β, at most what is left, whose weights are worth :data:`WORTH`; found on a log scale."""

    def enough(step: float) -> bool:
        return ess(-step * rise) >= WORTH * float(rise.isfinite().double().mean())

    if enough(left):
        return left
    low, high = math.log(left) - 100, math.log(left)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(math.exp(middle)) else (low, middle)
    return math.exp(low)


class Blend:
    """(1−β) E_0 + βE with its gradient, E_0 = −log N(0, scale²); β of all rows, or (B,)."""

    def __init__(self, problem: EnergyProblem, energy: Evaluator, beta: float | Tensor) -> None:
        self.problem, self.energy, self.beta = problem, energy, beta

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        geometry, variance, beta = self.problem.geometry, self.problem.scale**2, self.beta
        value, grad = self.energy.value_and_grad(x)
        base = (1 - beta) * geometry.log_normal(x, variance)
        rows = beta.view(-1, *[1] * (x.ndim - 1)) if isinstance(beta, Tensor) else beta
        return beta * value - base, (1 - rows) * geometry.normal_score(x, variance) - rows * grad
