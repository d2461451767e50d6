"""What an energy problem is: the energy, the space it lives on, and everything that is known exactly about e^{−E}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean, Geometry, noise
from tiltflow.core.settings import Positive, check_value
from tiltflow.energies.tempering import Tempering


class Modes(NamedTuple):
    """``centres`` (M, *event), float64, and ``weights`` (M,): the share of e^{−E} that is nearest to each centre."""

    centres: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class EnergyProblem:
    """A density p*(x) = e^{−E(x)} / Z to be sampled from E alone.

    Args:
        name: its key in ``ENERGY_PROBLEMS``.
        energy: E in kT, (B, *event) → (B,), differentiable.
        event_shape: the shape of one x.
        geometry: the state space; x is ``geometry.wrap(x)``.
        scale: standard deviation per coordinate of a Brownian base that covers the target, h(1).
        finest: smallest length worth resolving, σ_min: about a tenth of the narrowest standard deviation.
        identical: particles may be exchanged (centred particles only); False takes them in their order.
        sample: (n, generator) → n exact draws in the default dtype, where they can be had.
        reference: → stored samples (N, *event), wrapped by the geometry, float32. Raises TiltflowError if they are missing.
        log_z: log ∫ e^{−E}, where it is known.
        modes: where mode weights are known.
        settings: of a sampler's settings those that suit it and are not the defaults; chosen on seed 0.
        tempering: a plan of parallel tempering that reaches all of it.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    event_shape: tuple[int, ...]
    geometry: Geometry = field(default_factory=Euclidean)
    scale: float
    finest: float
    identical: bool = True
    sample: Callable[[int, torch.Generator], Tensor] | None = None
    reference: Callable[[], Tensor] | None = None
    log_z: float | None = None
    modes: Modes | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tempering: Tempering = field(default_factory=Tempering)

    def __post_init__(self) -> None:
        for name in ("scale", "finest"):
            check_value(f"{name} of {self.name}, a length,", getattr(self, name), Positive)
        if not self.finest < self.scale:
            raise TiltflowError(f"{self.name}: finest must be below scale, got {self.finest:g} and {self.scale:g}.")


def base_draws(problem: EnergyProblem, n: int, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """n draws of N(0, scale²) on the problem's space (None: its own scale): where an untrained sampler goes."""
    zeros = torch.zeros(n, *problem.event_shape, device=generator.device)
    return problem.geometry.wrap((scale or problem.scale) * noise(problem.geometry, zeros, generator))
