r"""Population Monte Carlo: draws of mixtures, weighted exactly, that the next mixture is fitted to.

Draws x_i of q_1, …, q_R count as draws of their mixture,

    w_i = e^{−E(x_i)} / (1/R) Σ_r q_r(x_i),      Ẑ = mean w

(the balance heuristic), so a proposal that missed something is mended by one that did not. Every mixture of Gaussians has a
twin with heavy tails beside it (a defensive mixture, Hesterberg 1995), which is left out where it is worth too little. Draws
that a mixture was fitted to would be weighed too low by it, so the answer comes from fresh ones. Cappé et al. 2008,
Statistics and Computing 18(4); Cornuet et al. 2012, arXiv:0907.1254 (AMIS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.weights import Evidence, evidence, systematic, tempered
from tiltflow.energies.anchor import Anchor, fitted, with_tails

GOOD, ENOUGH, TEMPERED = 0.5, 0.95, 0.3
"""ESS of a family that is kept; at which nothing is left to adapt; that weights are tempered to for a fit."""
AGAIN, FEW, POINTS = 3, 5, 3_000
"""Rounds between two choices of family; steps of EM in the others; points that a family is chosen on."""


Energies = Callable[[Tensor], Tensor]
"""E of draws (n, d), as (n,), both float64 on the CPU."""


@dataclass(frozen=True)
class Weighted:
    """x (n, d), float64, energies (n,), and log weights (n,) whose mean e^{…} is an unbiased Ẑ."""

    x: Tensor
    energy: Tensor
    log_weights: Tensor


def adapt(
    energy: Energies,
    starts: Sequence[Anchor],
    size: int,
    rounds: int,
    generator: torch.Generator,
    tell: Callable[[int, Evidence], None] = lambda done, found: None,
) -> list[Anchor]:
    """Mixtures adapted to e^{−E}: the later half of all rounds', those of them that are worth half of the best.

    Args:
        energy: E of draws.
        starts: The first mixtures; the next is fitted to the draws of all of them, by what their exact weights say.
        size: Draws of each round.
        rounds: At most; fewer if the ESS says that nothing is left to adapt.
        generator: Of every draw.
        tell: Told how many rounds are done, and what the last one's draws say.
    """
    rows: list[tuple[Anchor, Weighted, float]] = []
    fresh = list(starts)
    for r in range(rounds):
        said = []
        for now in fresh:
            drawn = weigh([now], energy, -(-size // len(fresh)), generator)
            said.append(evidence(drawn.log_weights))
            rows.append((now, drawn, said[-1].ess))
        found = max(said, key=lambda each: each.ess)
        tell(r + 1, found)
        if r + 1 == rounds or (found.ess >= ENOUGH and r > 0):
            break
        late = rows[len(rows) // 2 if r else 0 :]
        x, value = torch.cat([row[1].x for row in late]), torch.cat([row[1].energy for row in late])
        log_w = -value - log_mixture([row[0] for row in late], x)
        w, last = tempered(log_w, TEMPERED), rows[-len(fresh) + said.index(found)][0]
        now = _next(last, x, w, r % AGAIN == 0 and found.ess < GOOD, generator)
        fresh = [now, *([] if now.dof else [with_tails(now).refitted(x, w, FEW)])]
    late = rows[len(rows) // 2 :]
    best = max(row[2] for row in late)
    return [row[0] for row in late if row[2] >= best / 2]


def weigh(proposals: Sequence[Anchor], energy: Energies, n: int, generator: torch.Generator) -> Weighted:
    """About n fresh draws, as many of every proposal, weighted as draws of their mixture."""
    x = torch.cat([q.sample(-(-n // len(proposals)), generator) for q in proposals])
    value = energy(x)
    return Weighted(x, value, -value - log_mixture(proposals, x))


def log_mixture(proposals: Sequence[Anchor], x: Tensor) -> Tensor:
    """log mean_r q_r(x), (n,)."""
    return torch.stack([q.log_prob(x) for q in proposals]).logsumexp(0) - math.log(len(proposals))


def _next(now: Anchor, x: Tensor, w: Tensor, anew: bool, generator: torch.Generator) -> Anchor:
    """A mixture fitted to weighted draws: of a family chosen anew, or by a few more steps of EM."""
    if not anew:
        return now.refitted(x, w, FEW)
    half = torch.rand(len(w), generator=generator) < 0.5
    train, held = (x[part][systematic(w[part].log(), generator, min(POINTS, len(w) // 2))] for part in (half, ~half))
    return fitted(train, held, generator)
