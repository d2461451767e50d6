"""How right is a sampler of e^{−E}? All that the energy, path weights and reference samples can say.

The floor of a distance is the same statistic between two independent reference sets of the same size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain, NoiseChain
from tiltflow.core.control import DriftControl
from tiltflow.core.device import companion, double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus, noise
from tiltflow.core.value import reversed_log_ratio
from tiltflow.core.weights import ess, evidence, normalised, pareto_k
from tiltflow.energies import EnergyProblem, Evaluator, temperature, virial
from tiltflow.metrics.distance import total_variation, w2
from tiltflow.metrics.particles import distance_wasserstein, particle_w2
from tiltflow.metrics.sampling import energy_w2, mode_weights
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.evidence import beside_reference

PARTICLE_POINTS, PARTICLE_EXACT = 500, 4


def reference_samples(problem: EnergyProblem, n: int, generator: torch.Generator) -> Tensor | None:
    """Up to n reference samples in random order: exact draws, or rows of the stored set; None if there are none."""
    if problem.sample is not None:
        return problem.geometry.wrap(problem.sample(n, generator))
    if problem.reference is None:
        return None
    stored = problem.reference()
    return stored[torch.randperm(len(stored), generator=generator)[:n]]


def distances(problem: EnergyProblem, x: Tensor, y: Tensor, tag: str = "") -> dict[str, float]:
    """Distances between two sample sets of one size: w2, energy_w2, and for particles distance_w2."""
    finite = [e[torch.isfinite(e)] for e in (problem.energy(x), problem.energy(y))]
    row = {f"energy_w2{tag}": energy_w2(finite[0], finite[1])}
    if isinstance(problem.geometry, Centred) and problem.identical:
        n = len(x) if problem.event_shape[0] <= PARTICLE_EXACT else min(len(x), PARTICLE_POINTS)
        row[f"w2{tag}"] = particle_w2(x[:n], y[:n])
        row[f"distance_w2{tag}"] = distance_wasserstein(x, y)
    else:
        row[f"w2{tag}"] = w2(x.flatten(1), y.flatten(1))
    return row


def assess(
    problem: EnergyProblem, drawn: Drawn, reference: Tensor | None, generator: torch.Generator, n: int = 2_000
) -> dict[str, Any]:
    """One row about a drawn sample set.

    Args:
        problem: the energy and what is known of it.
        drawn: samples; distances use the first n, weights and log Z all of them.
        reference: at least 2n reference samples for distances with floors; None: no distances.
        generator: of random subsets.

    Raises:
        TiltflowError: fewer than 2n reference samples, or fewer than n drawn ones.
    """
    row: dict[str, Any] = {"samples": len(drawn.x), "rejected": int((~torch.isfinite(drawn.energy)).sum())}
    if drawn.log_weights is not None:
        found = evidence(drawn.log_weights)
        row |= {"log_z": found.log_z, "log_z_std": found.log_z_error, "ess": found.ess, "elbo": found.elbo}
        row["pareto_k"] = pareto_k(drawn.log_weights)
        if problem.log_z is not None:
            row["log_z_error"] = abs(found.log_z - problem.log_z)
    if problem.modes is not None:
        share = mode_weights(drawn.x, problem.modes.centres)
        row |= {
            "mode_tv": total_variation(share, problem.modes.weights),
            "modes": len(share),
            "modes_covered": int((share > 0).sum()),
            "modes_lost": lost_modes(share, problem.modes.weights, drawn),
        }
    if reference is not None:
        if len(reference) < 2 * n or len(drawn.x) < n:
            raise TiltflowError(f"distances at n = {n} need {2 * n} reference samples and n drawn ones; lower n.")
        row |= distances(problem, drawn.x[:n], reference[:n])
        row |= distances(problem, reference[n : 2 * n], reference[:n], "_floor")
    return row


def lost_modes(share: Tensor, weights: Tensor, drawn: Drawn) -> float:
    """Weight of the modes that have less than half of it among the samples, by more than chance (once in 10⁵ times)."""
    rows = len(drawn.x) if drawn.groups is None else len(drawn.groups.unique())
    missing = (weights - share) / (weights * (1 - weights) / rows).sqrt().clamp_min(1e-300)
    return float(weights[(share < weights / 2) & (missing > 4.3)].sum())


def from_both_sides(
    problem: EnergyProblem, chain: NoiseChain, control: DriftControl, reference: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """What paths drawn backwards from reference samples add: log Z with its standard error, EUBO, forward ESS."""
    if not isinstance(chain, BrownianChain) or chain.initial is not None:
        return {}
    x1 = reference[:2_000]
    base = chain.geometry.log_normal(x1, chain.end_variance)
    log_w = reversed_log_ratio(chain, control, x1, companion(generator, x1.device)) - problem.energy(x1) - base
    fraction = ess(-log_w)
    return {
        "log_z_forward": -evidence(-log_w).log_z,
        "log_z_forward_std": math.sqrt(max(1 / fraction - 1, 0.0) / len(x1)),
        "eubo": float(double(log_w).mean()),
        "forward_ess": fraction,
    }


def polished(
    problem: EnergyProblem, drawn: Drawn, reference: Tensor, generator: torch.Generator, n: int = 2_000
) -> dict[str, float]:
    """Distances after resampling by path weights: reported apart, never mixed in."""
    if drawn.log_weights is None:
        return {}
    pick = torch.multinomial(normalised(drawn.log_weights), n, replacement=True, generator=generator)
    return distances(problem, drawn.x[pick.to(drawn.x.device)], reference[:n], "_resampled")


def in_itself(problem: EnergyProblem, drawn: Drawn, alone: bool, generator: torch.Generator) -> dict[str, float]:
    """The temperature, and if samples are ``alone`` the virial, unless they are next to walls, where it does not hold."""
    finite = torch.isfinite(drawn.energy)
    if int(finite.sum()) < 2:
        return {}
    x, groups = drawn.x[finite], None if drawn.groups is None else drawn.groups[finite.cpu()]
    own, geometry = companion(generator, x.device), problem.geometry
    hot = temperature(problem.energy, x, (problem.finest, problem.scale), geometry, own, groups)
    row = {"temperature": hot.value, "temperature_std": hot.standard_error}
    moved = Evaluator(problem.energy).value(x + problem.finest * noise(geometry, x, own))
    if not alone or isinstance(geometry, Torus) or bool(moved.isinf().any()):
        return row
    found = virial(problem.energy, x, groups)
    dimension = geometry.dimension(problem.event_shape)
    return row | {"virial": found.mean, "virial_std": found.standard_error, "dimension": dimension}


class Assessed(NamedTuple):
    """The row of numbers, and the reference samples they were compared with (None: there are none)."""

    row: dict[str, Any]
    reference: Tensor | None


def assess_all(
    problem: EnergyProblem,
    drawn: Drawn,
    chain: NoiseChain | None,
    control: DriftControl | None,
    generator: torch.Generator,
    compared: int,
) -> Assessed:
    """All that can be said of drawn samples: distances, path weights from both sides, and without a reference the virial.

    ``compared`` is lowered to what the samples and the reference suffice for; without chain and control there are no paths.
    Raises what the problem's reference raises.
    """
    n = min(compared, len(drawn.x))
    reference = reference_samples(problem, max(2 * n, len(drawn.x)), generator)
    if reference is not None:
        reference = reference.to(drawn.x)
        n = min(n, len(reference) // 2)
    row = {"compared": n if reference is not None else 0} | assess(problem, drawn, reference, generator, n)
    if reference is not None and chain is not None and control is not None:
        row |= from_both_sides(problem, chain, control, reference, generator)
        row |= polished(problem, drawn, reference, generator, n)
    row |= in_itself(problem, drawn, reference is None, generator)
    if reference is not None:
        row |= beside_reference(problem, drawn, reference)
    return Assessed(row, reference)
