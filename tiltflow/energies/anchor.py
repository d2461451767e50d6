r"""Mixtures of Gaussians or Student's t, fitted to weighted points by expectation–maximisation.

    isotropic   Σ_j π_j t_ν(μ_j, v_j I)
    full        Σ_j π_j t_ν(μ_j, Σ_j)
    product     Π_i Σ_j π_ij t_ν(μ_ij, v_ij): coordinates are independent, each a mixture of its own

with ν = ∞ (Gaussians) or ν = 4. Small components are shrunk: variances towards their mean over components, covariances
towards a multiple of I. Family, number of components and ν are decided by points that were held out. Everything is float64.
Peel & McLachlan 2000, Statistics and Computing 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

HEAVY = 4
"""Degrees of freedom of heavy tails."""
FEWEST, SHRINK, KEEP = 1e-9, 20.0, 0.02
"""Least variance relative to that of the points; draws that a pooled variance counts for; share of the weights that all
components have alike."""
STEPS, CENTRES, POINTS, GAIN = 25, 3_000, 4, 5e-3
"""Steps of EM; points that centres are searched among; points that a full covariance takes for each coordinate; nats that a
larger mixture must gain on a held-out point."""


class Anchor(Protocol):
    """A density with exact draws. x: (n, d), float64; w: (n,), sums to 1."""

    @property
    def components(self) -> int:
        """How many."""
        ...

    @property
    def dof(self) -> int | None:
        """ν; None: ∞."""
        ...

    def refitted(self, x: Tensor, w: Tensor, steps: int = STEPS) -> Self:
        """After so many steps of EM."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (n,)."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, d)."""
        ...


@dataclass(frozen=True)
class Isotropic:
    """weights (J,), means (J, d), variances (J,)."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    dof: int | None = None

    @property
    def components(self) -> int:
        return len(self.weights)

    @classmethod
    def started(cls, x: Tensor, w: Tensor, components: int, generator: torch.Generator) -> Self:
        """From centres that are far apart."""
        means = _centres(x, w, components, generator)
        nearest = torch.cdist(x, means).min(1).values.square()
        variance = (w * nearest).sum() / x.shape[1] + _least(x, w)
        return cls(_even(components), means, variance.expand(components)).refitted(x, w)

    def refitted(self, x: Tensor, w: Tensor, steps: int = STEPS) -> Self:
        now, d = self, x.shape[1]
        for _ in range(steps):
            share = w[:, None] * now._parts(x).softmax(1)
            near = share * _pull(now._squared(x), d, self.dof)
            mass, means = share.sum(0).clamp_min(1e-300), near.T @ x / near.sum(0).clamp_min(1e-300)[:, None]
            variances = (near * torch.cdist(x, means).square()).sum(0) / mass / d + _least(x, w)
            many = _effective(share) * d
            pooled = (mass * variances).sum() / mass.sum()
            variances = (many * variances + SHRINK * pooled) / (many + SHRINK)
            now = replace(now, weights=_kept(mass), means=means, variances=variances)
        return now

    def _squared(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.means).square() / self.variances

    def _parts(self, x: Tensor) -> Tensor:
        d = x.shape[1]
        return self.weights.log() - 0.5 * d * self.variances.log() + _log_kernel(self._squared(x), d, self.dof)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._parts(x).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[i] + self.variances[i, None].sqrt() * _draws((n, self.means.shape[1]), self.dof, 1, generator)


@dataclass(frozen=True)
class Full:
    """weights (J,), means (J, d), and the Cholesky factors of Σ_j, (J, d, d)."""

    weights: Tensor
    means: Tensor
    factors: Tensor
    dof: int | None = None

    @property
    def components(self) -> int:
        return len(self.weights)

    @classmethod
    def started(cls, x: Tensor, w: Tensor, components: int, generator: torch.Generator) -> Self:
        """From isotropic ones."""
        start = Isotropic.started(x, w, components, generator)
        factors = start.variances.sqrt()[:, None, None] * torch.eye(x.shape[1], dtype=x.dtype)
        return cls(start.weights, start.means, factors).refitted(x, w)

    def refitted(self, x: Tensor, w: Tensor, steps: int = STEPS) -> Self:
        now, d, least = self, x.shape[1], _least(x, w)
        eye = torch.eye(d, dtype=x.dtype)
        for _ in range(steps):
            share = w[:, None] * now._parts(x).softmax(1)
            near = share * _pull(now._squared(x), d, self.dof)
            mass, means = share.sum(0).clamp_min(1e-300), near.T @ x / near.sum(0).clamp_min(1e-300)[:, None]
            factors = []
            for j, many in enumerate(_effective(share)):
                apart = x - means[j]
                covariance = (near[:, j, None] * apart).T @ apart / mass[j]
                covariance = (many * covariance + d * covariance.diagonal().mean() * eye) / (many + d)
                factors.append(torch.linalg.cholesky(covariance + least * eye))
            now = replace(now, weights=_kept(mass), means=means, factors=torch.stack(factors))
        return now

    def _squared(self, x: Tensor) -> Tensor:
        apart = (x - self.means[:, None]).mT  # (J, d, n)
        return torch.linalg.solve_triangular(self.factors, apart, upper=False).square().sum(1).T

    def _parts(self, x: Tensor) -> Tensor:
        volume = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.weights.log() - volume + _log_kernel(self._squared(x), x.shape[1], self.dof)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._parts(x).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x = _draws((n, self.means.shape[1]), self.dof, 1, generator)
        for j in i.unique():
            x[i == j] = self.means[j] + x[i == j] @ self.factors[j].T
        return x


@dataclass(frozen=True)
class Product:
    """weights, means and variances (d, J) of the coordinates' own mixtures."""

    weights: Tensor
    means: Tensor
    variances: Tensor
    dof: int | None = None

    @property
    def components(self) -> int:
        return self.weights.shape[1]

    @classmethod
    def started(cls, x: Tensor, w: Tensor, components: int, generator: torch.Generator) -> Self:
        """From quantiles of every coordinate."""
        points = _resampled(x, w, generator)
        means = torch.quantile(points, (torch.arange(components, dtype=x.dtype) + 0.5) / components, dim=0).T.contiguous()
        variances = (points.var(0)[:, None] / components**2).expand_as(means) + _least(x, w)
        return cls(_even(components).expand_as(means), means, variances).refitted(x, w)

    def refitted(self, x: Tensor, w: Tensor, steps: int = STEPS) -> Self:
        now, least = self, 1e-4 * (w @ x.square() - (w @ x).square())[:, None] + _least(x, w)
        for _ in range(steps):
            share = w[:, None, None] * now._parts(x).softmax(2)
            near = share * _pull(now._squared(x), 1, self.dof)
            mass, means = share.sum(0).clamp_min(1e-300), (near * x[..., None]).sum(0) / near.sum(0).clamp_min(1e-300)
            variances = (near * (x[..., None] - means).square()).sum(0) / mass + least
            now = replace(now, weights=_kept(mass), means=means, variances=variances)
        return now

    def _squared(self, x: Tensor) -> Tensor:
        return (x[..., None] - self.means).square() / self.variances

    def _parts(self, x: Tensor) -> Tensor:
        return self.weights.log() - 0.5 * self.variances.log() + _log_kernel(self._squared(x), 1, self.dof)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._parts(x).logsumexp(2).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)  # (d, n)
        mean, variance = self.means.gather(1, i).T, self.variances.gather(1, i).T
        return mean + variance.sqrt() * _draws(mean.shape, self.dof, mean.shape[1], generator)


def fitted(train: Tensor, held: Tensor, generator: torch.Generator, most: int = 100) -> Anchor:
    """The family, the number of components and ν that explain held-out points best.

    Args:
        train: Points (n, d).
        held: Others (m, d), independent of them.
        generator: Of the starts.
        most: Components at most.
    """
    w = torch.full((len(train),), 1 / len(train), dtype=train.dtype)

    def score(anchor: Anchor) -> float:
        return float(anchor.log_prob(held).mean())

    found: list[Anchor] = []
    for family, points in ((Isotropic, 8), (Product, 8), (Full, POINTS * train.shape[1])):
        components, last, failed = 1, -math.inf, 0
        while components <= max(1, min(most, len(train) // points)) and failed < 2:
            found.append(family.started(train, w, components, generator))
            value = score(found[-1])
            failed = 0 if value > last + GAIN else failed + 1
            last, components = max(last, value), 2 * components
    best = max(found, key=score)
    return max(best, with_tails(best).refitted(train, w), key=score)


def with_tails(anchor: Anchor) -> Anchor:
    """The same with ν = 4."""
    return replace(anchor, dof=HEAVY)  # type: ignore[type-var]


def _log_kernel(squared: Tensor, d: int, dof: int | None) -> Tensor:
    """Log-density of a standard one at ‖x‖² = squared."""
    if dof is None:
        return -0.5 * (squared + d * math.log(2 * math.pi))
    constant = math.lgamma((dof + d) / 2) - math.lgamma(dof / 2) - 0.5 * d * math.log(dof * math.pi)
    return constant - 0.5 * (dof + d) * torch.log1p(squared / dof)


def _pull(squared: Tensor, d: int, dof: int | None) -> Tensor | float:
    """What a point counts for in the moments of a component."""
    return 1.0 if dof is None else (dof + d) / (dof + squared)


def _draws(shape: tuple[int, ...], dof: int | None, radii: int, generator: torch.Generator) -> Tensor:
    """Standard draws (n, d), with ``radii`` radii a row: 1, or d for coordinates that are independent."""
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dof is None:
        return z
    chi = torch.randn((dof, shape[0], radii), generator=generator, dtype=torch.float64).square().sum(0)
    return z * (dof / chi).sqrt()


def _centres(x: Tensor, w: Tensor, components: int, generator: torch.Generator) -> Tensor:
    """Points that are far apart, drawn as k-means++ draws them (Arthur & Vassilvitskii 2007)."""
    x = _resampled(x, w, generator)
    means = x[:1]
    nearest = torch.cdist(x, means)[:, 0].square()
    for _ in range(components - 1):
        new = x[torch.multinomial(nearest + 1e-300, 1, generator=generator)]
        nearest = torch.minimum(nearest, torch.cdist(x, new)[:, 0].square())
        means = torch.cat([means, new])
    return means


def _resampled(x: Tensor, w: Tensor, generator: torch.Generator) -> Tensor:
    return x[torch.multinomial(w, CENTRES, replacement=True, generator=generator)]


def _effective(share: Tensor) -> Tensor:
    """Points that each component rests on, (J,)."""
    return share.sum(0).square() / share.square().sum(0).clamp_min(1e-300)


def _kept(mass: Tensor) -> Tensor:
    """Weights along the last axis, none of which is lost for good."""
    return (1 - KEEP) * mass / mass.sum(-1, keepdim=True) + KEEP / mass.shape[-1]


def _least(x: Tensor, w: Tensor) -> Tensor:
    """A variance that is nothing beside that of the points."""
    return FEWEST * (w @ x.square() - (w @ x).square()).mean() + 1e-300


def _even(components: int) -> Tensor:
    return torch.full((components,), 1 / components, dtype=torch.float64)
