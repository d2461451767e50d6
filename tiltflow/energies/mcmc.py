r"""Classical samplers of e^{−E}: a baseline for the learned ones, a polish for their samples, a maker of reference sets.

The Metropolis-adjusted Langevin algorithm at temperature T proposes, with ξ ~ N(0, I) in the tangent space,

    x' = x − (ε/T) ∇E(x) + √(2ε) ξ,      ξ' = (x − x' + (ε/T) ∇E(x')) / √(2ε)  (the noise of the way back),
    log α = −(E(x') − E(x))/T − ½‖ξ'‖² + ½‖ξ‖²,

and accepts with probability min(1, α). Roberts & Tweedie 1996, Bernoulli 2(4); acceptance .574 is best in high dimension
(Roberts & Rosenthal 1998). Parallel tempering runs it at T_1 < … < T_R and exchanges neighbours with probability
min(1, exp[(1/T_r − 1/T_{r+1})(E_r − E_{r+1})]) (Geyer 1991), even and odd pairs in turn.

On the torus the chain runs in the ambient space, where E is periodic and the kernel commutes with the windings, so wrapping
what it leaves is exact. For centred particles drift and noise are projected, and all norms are those of the subspace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean, Geometry, noise
from tiltflow.energies.evaluator import Energy, Evaluator

ACCEPTANCE = 0.574


class Polished(NamedTuple):
    """x (B, *event) after the moves, the share of them accepted, and the energies (each with its gradient) evaluated."""

    x: Tensor
    acceptance: float
    evaluations: int


class Tempered(NamedTuple):
    """What a run of parallel tempering leaves, after burn-in.

    samples (S, C, *event) at the lowest temperature; energies (S, R, C) at all; acceptance (R,) of moves and swaps (R − 1,)
    of neighbours; step (R,) ε at each temperature; energies (each with its gradient) evaluated and seconds, with burn-in.
    """

    samples: Tensor
    energies: Tensor
    acceptance: Tensor
    swaps: Tensor
    step: Tensor
    evaluations: int
    seconds: float


class _State(NamedTuple):
    x: Tensor
    energy: Tensor
    gradient: Tensor


def _start(energy: Evaluator, x: Tensor) -> _State:
    state = _State(x.detach(), *energy.value_and_grad(x))
    bad = int(state.energy.isinf().sum())
    if bad:
        raise TiltflowError(f"{bad} of {len(x)} starting points have no finite energy; start elsewhere, or minimise first.")
    return state


def _column(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 1))


def _log_ratio(rise: Tensor, forth: Tensor, back: Tensor) -> Tensor:
    """log α from (E' − E)/T (B,) and the noises ξ and ξ' (B, *event); what is not finite is refused (E' = ∞ too)."""
    value = -rise + 0.5 * (forth.square() - back.square()).flatten(1).sum(1)
    return torch.where(value.isfinite(), value, -math.inf)


def _move(
    energy: Evaluator, state: _State, step: Tensor, beta: Tensor, generator: torch.Generator, geometry: Geometry
) -> tuple[_State, Tensor, Tensor]:
    """One move of every row at its own step and inverse temperature (B,): state, which were accepted, min(1, α)."""
    x, scale, pull = state.x, _column((2 * step).sqrt(), state.x), _column(step * beta, state.x)
    forth = noise(geometry, x, generator)
    proposal = x - pull * geometry.project(state.gradient) + scale * forth
    new = _State(proposal, *energy.value_and_grad(proposal))
    back = (x - new.x + pull * geometry.project(new.gradient)) / scale
    chance = _log_ratio(beta * (new.energy - state.energy), forth, back).exp().clamp_max(1)
    accepted = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) < chance
    kept = _State(*[torch.where(_column(accepted, a), a, b) for a, b in zip(new, state)])
    return kept._replace(x=geometry.wrap(kept.x)), accepted, chance


def mala(
    energy: Energy,
    x: Tensor,
    step: float | Tensor,
    n: int,
    generator: torch.Generator,
    geometry: Geometry | None = None,
) -> Polished:
    """n moves of MALA at temperature 1 from x (B, *event): a polish of samples that are nearly right.

    energy: in kT, read through an :class:`Evaluator`; ``step`` is ε, in units of x², one for all or (B,). Raises
    TiltflowError if ``step`` is not positive, if a starting point has no finite energy, and what the Evaluator raises.
    """
    steps = torch.as_tensor(step, dtype=x.dtype, device=x.device).expand(len(x))
    if not bool((steps > 0).all()):
        raise TiltflowError(f"the step of MALA must be positive, got {step}.")
    geometry = geometry or Euclidean()
    evaluator = Evaluator(energy)
    state = _start(evaluator, geometry.wrap(x))
    ones, moved = torch.ones(len(x), dtype=x.dtype, device=x.device), 0.0
    for _ in range(n):
        state, accepted, _ = _move(evaluator, state, steps, ones, generator, geometry)
        moved += float(double(accepted).mean())
    return Polished(state.x, moved / max(n, 1), evaluator.evaluations)


def _swap(state: _State, beta: Tensor, parity: int, generator: torch.Generator) -> tuple[_State, Tensor, Tensor]:
    """Exchange neighbours (parity, parity + 1), …: the state, their lower indices, and the share of each that took place.

    state: tensors of shape (R, C, …); beta: (R,).
    """
    replicas, chains = state.energy.shape
    low = torch.arange(replicas - 1, device=beta.device)[parity::2]
    gain = (beta[low] - beta[low + 1])[:, None] * (state.energy[low] - state.energy[low + 1])
    accepted = torch.rand(gain.shape, generator=generator, dtype=gain.dtype, device=gain.device) < gain.exp()
    source = torch.arange(replicas, device=beta.device)[:, None].repeat(1, chains)
    source[low] += accepted.long()
    source[low + 1] -= accepted.long()
    chain = torch.arange(chains, device=beta.device)
    return _State(*[t[source, chain] for t in state]), low, accepted.to(beta.dtype).mean(1)


def parallel_tempering(
    energy: Energy,
    x0: Tensor,
    temperatures: Sequence[float],
    steps: int,
    generator: torch.Generator,
    *,
    burn_in: int,
    thin: int,
    step: float = 1e-3,
    geometry: Geometry | None = None,
) -> Tempered:
    """C independent chains of R replicas each; all R·C states are moved by one call of the energy per step.

    x0 (C, *event) starts all replicas of a chain; temperatures ascend, and the first is the target's (1 for e^{−E}). After
    each move neighbours are swapped. During ``burn_in`` steps ε, which starts at ``step`` (units of x²), is adapted at each
    temperature to acceptance .574; then it is fixed, and every ``thin``-th of ``steps`` further steps is kept.

    Raises TiltflowError for a ladder that does not ascend from a positive temperature, for ``thin`` outside 1 … steps, a
    non-positive step, and as :func:`mala` for the energy.
    """
    ladder = torch.tensor(list(temperatures), dtype=x0.dtype, device=x0.device)
    if len(ladder) == 0 or not bool((ladder > 0).all() and (ladder.diff() > 0).all()):
        raise TiltflowError(f"temperatures must be positive and ascend, got {list(temperatures)}.")
    if not 1 <= thin <= steps or burn_in < 0 or not step > 0:
        given = f"thin={thin}, steps={steps}, burn_in={burn_in}, step={step}"
        raise TiltflowError(f"needs 1 ≤ thin ≤ steps, burn_in ≥ 0 and step > 0, got {given}.")
    geometry, started = geometry or Euclidean(), time.perf_counter()
    replicas, chains = len(ladder), len(x0)
    beta = 1 / ladder
    evaluator = Evaluator(energy)
    state = _start(evaluator, geometry.wrap(x0).repeat(replicas, *[1] * (x0.dim() - 1)))
    log_step = torch.full_like(beta, math.log(step))
    moved, swapped, tried = torch.zeros_like(beta), torch.zeros_like(beta[1:]), torch.zeros_like(beta[1:])
    samples, energies = [], []
    for k in range(1, burn_in + steps + 1):
        rates, betas = log_step.exp().repeat_interleave(chains), beta.repeat_interleave(chains)
        state, accepted, chance = _move(evaluator, state, rates, betas, generator, geometry)
        grid = _State(*[t.view(replicas, chains, *t.shape[1:]) for t in state])
        grid, low, share = _swap(grid, beta, k % 2, generator)
        state = _State(*[t.flatten(0, 1) for t in grid])
        if k <= burn_in:
            log_step += 2 * k**-0.6 * (chance.view(replicas, chains).mean(1) - ACCEPTANCE)
            continue
        moved += accepted.view(replicas, chains).to(beta.dtype).mean(1) / steps
        swapped[low] += share
        tried[low] += 1
        if (k - burn_in) % thin == 0:
            samples.append(grid.x[0].clone())
            energies.append(grid.energy.clone())
    kept = torch.stack(samples), torch.stack(energies)
    return Tempered(
        *kept, moved, swapped / tried.clamp_min(1), log_step.exp(), evaluator.evaluations, time.perf_counter() - started
    )
