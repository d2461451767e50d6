r"""Stored reference samples, and the identities that say which energy samples belong to.

For x ~ e^{−E} / Z in d dimensions, integration by parts gives the virial identity

    E[x·∇E(x)] = d,

d = m(N − 1) for particles with their centre of mass at zero. It needs no log Z, costs one gradient per sample, and rejects
a wrong temperature, a pair counted twice, or a chain that is not in equilibrium.

For x ~ e^{−E/T} and x' = x + hξ, ξ ~ N(0, I), the two signs of Δ = E(x') − E(x) balance in detail:

    P(Δ) / P(−Δ) = e^{Δ/T},

so that, given |Δ|, its sign is a coin whose log-odds are |Δ|/T, and 1/T is a logistic regression. It needs no gradient and
no moments, and holds beside walls (where Δ = ∞), on a torus, and at any h: samples have a temperature at every length.
"""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Geometry, noise
from tiltflow.energies.evaluator import Energy, Evaluator

MOVES, LARGE, NEWTON = 8, 30.0, 30
"""Moves of each sample; |Δ| in kT above which a sign says nothing; steps of Newton's method."""
SHIPPED = {"dw4": (4, 2), "lj13": (13, 3), "lj55": (55, 3)}


class Virial(NamedTuple):
    """Mean of x·∇E over the samples, and its standard error."""

    mean: float
    standard_error: float


def load_reference(name: str) -> Tensor:
    """Reference samples (N, *event) of "dw4", "lj13" or "lj55", float32, centre of mass at zero (see REFERENCES.md).

    Raises:
        TiltflowError: no such name; a file that is missing or of another shape.
    """
    if name not in SHIPPED:
        raise TiltflowError(f"no reference samples are called {name!r}; there are {', '.join(SHIPPED)}.")
    path = Path(str(files("tiltflow.energies") / "assets" / f"{name}_reference.safetensors"))
    if not path.is_file():
        raise TiltflowError(f"the reference samples of {name} are missing ({path.name}): reinstall tiltflow.")
    samples = load_file(path).get("samples")
    if samples is None or samples.shape[1:] != SHIPPED[name]:
        raise TiltflowError(f"{path} must hold one tensor `samples` of shape (N, {', '.join(map(str, SHIPPED[name]))}).")
    return samples


class Temperature(NamedTuple):
    """T of the samples, and its standard error."""

    value: float
    standard_error: float


def temperature(
    energy: Energy,
    samples: Tensor,
    lengths: tuple[float, float],
    geometry: Geometry,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Temperature:
    """T at which ``samples`` (N, *event) are in detailed balance, 1 for e^{−E}; NaN where no move says anything.

    Moves h are spread from the first of ``lengths`` to the second, evenly in log h. Draws are independent, or related within
    ``groups`` (N,).
    """
    evaluator, signs, sizes = Evaluator(energy, batch=10_000), list[Tensor](), list[Tensor]()
    before, (low, high) = double(evaluator.value(samples)), map(math.log, lengths)
    for _ in range(MOVES):
        u = torch.rand(len(samples), *[1] * (samples.ndim - 1), generator=generator, device=generator.device)
        h = (low + (high - low) * u).exp().to(samples)
        moved = geometry.wrap(samples + h * noise(geometry, samples, generator))
        rise = double(evaluator.value(moved)) - before
        rise = torch.where(rise.isfinite() & (rise.abs() < LARGE), rise, 0.0)
        signs.append((rise > 0).double())
        sizes.append(rise.abs())
    up, size, beta = torch.stack(signs, 1), torch.stack(sizes, 1), 1.0
    for _ in range(NEWTON):
        odds = torch.sigmoid(beta * size)
        slope = float((size.square() * odds * (1 - odds)).sum())
        if not slope > 0:
            return Temperature(math.nan, math.nan)
        beta += float((size * (up - odds)).sum()) / slope
        beta = min(max(beta, 1e-3), 1e3)
    error = _spread((size * (up - torch.sigmoid(beta * size))).sum(1), groups) / slope
    return Temperature(1 / beta, error / beta**2)


def _spread(terms: Tensor, groups: Tensor | None) -> float:
    """Standard deviation of the sum of terms (N,) of mean 0, which are related within groups."""
    if groups is None:
        return float(terms.square().sum().sqrt())
    names, which = groups.unique(return_inverse=True)
    sums = torch.zeros(len(names), dtype=terms.dtype).index_add_(0, which, terms)
    return math.sqrt(float(sums.square().sum()) * len(names) / max(len(names) - 1, 1))


def virial(energy: Energy, samples: Tensor, groups: Tensor | None = None) -> Virial:
    """Mean and standard error of x·∇E over ``samples`` (N, *event): N ≥ 2 draws, centred if particles are.

    Draws are independent, or related within ``groups`` (N,).

    Raises:
        TiltflowError: fewer than two samples; samples at which the energy is not finite.
    """
    if len(samples) < 2:
        raise TiltflowError(f"a mean with its error needs at least 2 samples, got {len(samples)}.")
    evaluator = Evaluator(energy, batch=1000)
    x = samples.double() if samples.device.type == "cpu" else samples
    _, grad = evaluator.value_and_grad(x)
    if evaluator.rejected:
        raise TiltflowError(
            f"the energy or its gradient is not finite at {evaluator.rejected} of {len(x)} samples: they cannot be "
            "samples of it."
        )
    terms = double(x * grad).flatten(1).sum(1)
    return Virial(float(terms.mean()), _spread(terms - terms.mean(), groups) / len(x))
