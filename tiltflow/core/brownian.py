r"""Base processes of pure noise, for sampling from an energy: X_t = X_0 + noise of accumulated variance h²(t), no drift.

With ζ = h²(t)/h²(1), and from X_0 = 0 (the Föllmer case),

    X_t | X_0, X_1 ~ N((1−ζ)X_0 + ζX_1, h²(1) ζ(1−ζ) I),    p_1^base = N(0, h²(1) I)

on the geometry's tangent space. A drift-free base is its own exact chain: x_{k+1} ~ N(x_k, s_k² I) with
s_k² = h²(t_{k+1}) − h²(t_k), so the path weights have no discretisation bias for any number of steps. Havens et al. 2025,
arXiv:2504.11713.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, Index, at, noisy_steps, one_start, uniform_grid
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Geometry, noise


def _cached_left(chain: Any, finest: float) -> Tensor:
    """√(remaining + finest²), one tensor for one ``finest``: on an accelerator it is sent once."""
    known = chain._lefts
    if finest not in known:
        known[finest] = (chain.remaining + finest**2).sqrt()
    return known[finest]


class NoiseChain(Chain, Protocol):
    """A chain over pure noise, whose end law from its source is N(0, h²(1)) unless ``initial`` makes it something else."""

    @property
    def initial(self) -> Callable[[int, torch.Generator], Tensor] | None: ...

    @property
    def end_variance(self) -> float: ...

    @property
    def remaining(self) -> Tensor: ...

    def left(self, finest: float) -> Tensor: ...


@dataclass(frozen=True)
class BrownianChain:
    """The chain; ``variance`` (K+1,) is h² at the times ``t``; ``initial`` draws X_0 (None: the point 0)."""

    geometry: Geometry
    event_shape: tuple[int, ...]
    t: Tensor
    variance: Tensor
    initial: Callable[[int, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if not bool((self.variance.diff() > 0).all()) or float(self.variance[0]) != 0:
            raise TiltflowError("the accumulated variance of a Brownian chain must rise strictly from 0.")

    @cached_property
    def std(self) -> Tensor:
        """s_k, (K,)."""
        return self.variance.diff().sqrt()

    @cached_property
    def controlled(self) -> Tensor:
        """All steps, (K,)."""
        return noisy_steps(self.std)

    @cached_property
    def memoryless(self) -> bool:
        """Whether all paths start at one point: without a drift the end keeps the start."""
        return one_start(self)

    @property
    def end_variance(self) -> float:
        """h²(1)."""
        return float(self.variance[-1])

    @cached_property
    def remaining(self) -> Tensor:
        """h²(1) − h²(t_k), (K+1,)."""
        return self.variance[-1] - self.variance

    @cached_property
    def _lefts(self) -> dict[float, Tensor]:
        return {}

    def left(self, finest: float) -> Tensor:
        """√(h²(1) − h²(t_k) + finest²), (K+1,)."""
        return _cached_left(self, finest)

    @cached_property
    def zeta(self) -> Tensor:
        """ζ_k, (K+1,)."""
        return self.variance / self.variance[-1]

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """x: Brownian motion is a martingale."""
        return x

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of X_0 in the default dtype."""
        if self.initial is not None:
            return self.geometry.wrap(self.initial(n, generator))
        return torch.zeros(n, *self.event_shape, device=generator.device)

    def bridge(self, k: Tensor, x0: Tensor, x1: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_k ~ base(· | x0, x1) for one step per row, and the standard normal tangent ε it was made of; x1 ambient."""
        zeta = at(self.zeta, k, x1)
        eps = noise(self.geometry, x1, generator)
        return (1 - zeta) * x0 + zeta * x1 + (self.end_variance * zeta * (1 - zeta)).sqrt() * eps, eps


def geometric_chain(
    geometry: Geometry,
    event_shape: tuple[int, ...],
    steps: int,
    scale: float,
    finest: float,
    initial: Callable[[int, torch.Generator], Tensor] | None = None,
) -> BrownianChain:
    """Geometric noise g(t) = σ_min r^{1−t} √(2 ln r) on a uniform grid: h²(t) = σ_max²(1 − r^{−2t}), r = σ_max/σ_min.

    What is still to come after t, plus σ_min², shrinks by one factor per step, so every step is worth the same in KL.

    Args:
        geometry, event_shape: the state space.
        steps: K. scale: σ_max, about the spread of the target or more. finest: σ_min, its finest detail.
        initial: draws X_0; None: the point 0.

    Raises:
        TiltflowError: unless 0 < finest < scale and steps ≥ 1.
    """
    if not 0 < finest < scale or steps < 1:
        raise TiltflowError(f"geometric noise needs 0 < finest < scale and steps ≥ 1; got {finest}, {scale}, {steps}.")
    t = uniform_grid(steps)
    return BrownianChain(geometry, event_shape, t, -(scale**2) * torch.expm1(-2 * math.log(scale / finest) * t), initial)


def constant_chain(
    geometry: Geometry,
    event_shape: tuple[int, ...],
    steps: int,
    scale: float,
    initial: Callable[[int, torch.Generator], Tensor] | None = None,
) -> BrownianChain:
    """Constant noise σ: h²(t) = σ²t on a uniform grid."""
    t = uniform_grid(steps)
    return BrownianChain(geometry, event_shape, t, scale**2 * t, initial)


@dataclass(frozen=True)
class OrnsteinUhlenbeckChain:
    r"""The stationary base of the Denoising Diffusion Sampler: x_{k+1} ~ N(√(1−a_k) x_k, σ²a_k I) from N(0, σ² I).

    1 − a_k = ᾱ_k/ᾱ_{k+1} with the cosine schedule ᾱ(t) = sin²(πt/2), kept ≥ 1e-4: memoryless up to that. Vargas, Grathwohl &
    Doucet 2023, arXiv:2302.13834.
    """

    geometry: Geometry
    event_shape: tuple[int, ...]
    steps: int
    scale: float
    initial: ClassVar[None] = None
    memoryless: ClassVar[bool] = True

    @cached_property
    def t(self) -> Tensor:
        """Uniform times, (K+1,)."""
        return uniform_grid(self.steps)

    @cached_property
    def _signal(self) -> Tensor:
        """ᾱ at the grid, (K+1,), rising to 1."""
        return (torch.sin(0.5 * math.pi * self.t) ** 2).clamp_min(1e-4)

    @cached_property
    def std(self) -> Tensor:
        """s_k = σ√a_k, (K,)."""
        return self.scale * (1 - self._signal[:-1] / self._signal[1:]).sqrt()

    @cached_property
    def controlled(self) -> Tensor:
        """The steps with noise, (n,): not those, if any, on which ᾱ is held at 1e-4."""
        return noisy_steps(self.std)

    @property
    def end_variance(self) -> float:
        """σ²."""
        return self.scale**2

    @cached_property
    def remaining(self) -> Tensor:
        """σ²(1 − ᾱ_k), (K+1,)."""
        return self.scale**2 * (1 - self._signal)

    @cached_property
    def _lefts(self) -> dict[float, Tensor]:
        return {}

    def left(self, finest: float) -> Tensor:
        """√(σ²(1 − ᾱ_k) + finest²), (K+1,)."""
        return _cached_left(self, finest)

    @cached_property
    def _shrink(self) -> Tensor:
        """√(1−a_k), (K,)."""
        return (self._signal[:-1] / self._signal[1:]).sqrt()

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """√(1−a_k) x."""
        return at(self._shrink, k, x) * x

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """N(0, σ²) on the tangent space."""
        return self.scale * noise(self.geometry, torch.zeros(n, *self.event_shape, device=generator.device), generator)
