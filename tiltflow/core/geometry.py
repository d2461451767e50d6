r"""State spaces: where noise lives, what a tangent vector is, and the law of a Brownian motion from 0 at variance h².

* Euclidean R^d;
* particles with their centre of mass at zero, of dimension m(N − 1): noise, bridges and targets are projected on that
  subspace, and its dimension is the one in every log-density;
* the torus [−π, π)^d: paths run in the ambient R^d (controls and energies are periodic), end points are wrapped, and the
  base law is the wrapped normal Σ_n N(x + 2πn; 0, h²).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

WINDINGS = 6  # 13 images: log-density error 2e-15 at h = 5, 7e-5 at h = 10


def _flat_sum(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).sum(1)


class Geometry(Protocol):
    """x, v: (B, *event)."""

    def project(self, v: Tensor) -> Tensor:
        """The tangent part of an ambient vector."""
        ...

    def wrap(self, x: Tensor) -> Tensor:
        """The canonical representative of a state."""
        ...

    def dimension(self, event_shape: Sequence[int]) -> int:
        """Degrees of freedom."""
        ...

    def log_normal(self, x: Tensor, variance: float) -> Tensor:
        """Log-density at x, (B,), of Brownian motion from 0 when its variance is ``variance``."""
        ...

    def normal_score(self, x: Tensor, variance: float) -> Tensor:
        """∇ of :meth:`log_normal`."""
        ...

    def lift(self, x: Tensor, variance: float, generator: torch.Generator) -> Tensor:
        """An ambient end point above x, drawn from the base conditioned on x."""
        ...


def noise(geometry: Geometry, x: Tensor, generator: torch.Generator) -> Tensor:
    """A standard normal tangent vector of the shape of x."""
    return geometry.project(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))


@dataclass(frozen=True)
class Euclidean:
    """R^d."""

    def project(self, v: Tensor) -> Tensor:
        return v

    def wrap(self, x: Tensor) -> Tensor:
        return x

    def dimension(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def log_normal(self, x: Tensor, variance: float) -> Tensor:
        return -0.5 * (_flat_sum(x**2) / variance + self.dimension(x.shape[1:]) * math.log(2 * math.pi * variance))

    def normal_score(self, x: Tensor, variance: float) -> Tensor:
        return -x / variance

    def lift(self, x: Tensor, variance: float, generator: torch.Generator) -> Tensor:
        return x


@dataclass(frozen=True)
class Centred(Euclidean):
    """N particles in R^m, x (B, N, m), with their centre of mass at zero. Köhler, Klein & Noé 2020, arXiv:2006.02425."""

    def project(self, v: Tensor) -> Tensor:
        return v - v.mean(-2, keepdim=True)

    def wrap(self, x: Tensor) -> Tensor:
        return self.project(x)

    def dimension(self, event_shape: Sequence[int]) -> int:
        if len(event_shape) < 2:
            raise TiltflowError(f"centred particles have shape (N, m), got {tuple(event_shape)}.")
        return math.prod(event_shape) - event_shape[-1]


@dataclass(frozen=True)
class Torus:
    """Angles in [−π, π)^d."""

    def project(self, v: Tensor) -> Tensor:
        return v

    def wrap(self, x: Tensor) -> Tensor:
        return torch.remainder(x + math.pi, 2 * math.pi) - math.pi

    def dimension(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def _images(self, x: Tensor, variance: float) -> tuple[Tensor, Tensor]:
        """Ambient images (13, …) of wrapped x, and their densities relative to that of the nearest, x itself."""
        shift = 2 * math.pi * torch.arange(-WINDINGS, WINDINGS + 1, dtype=x.dtype, device=x.device)
        x = self.wrap(x)
        images = x + shift.reshape(-1, *(1,) * x.ndim)
        return images, ((x**2 - images**2) / (2 * variance)).exp()

    def log_normal(self, x: Tensor, variance: float) -> Tensor:
        density = self._images(x, variance)[1].sum(0).log() - self.wrap(x) ** 2 / (2 * variance)
        return _flat_sum(density - 0.5 * math.log(2 * math.pi * variance))

    def normal_score(self, x: Tensor, variance: float) -> Tensor:
        images, density = self._images(x, variance)
        return -(density * images).sum(0) / (variance * density.sum(0))

    def lift(self, x: Tensor, variance: float, generator: torch.Generator) -> Tensor:
        density = self._images(x, variance)[1].cumsum(0)
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) * density[-1]
        return self.wrap(x) + 2 * math.pi * ((density < u).sum(0).clamp_max(2 * WINDINGS) - WINDINGS)
