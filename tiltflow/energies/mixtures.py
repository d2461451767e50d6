r"""Gaussian mixtures as energies: E(x) = −log Σ_i w_i N(x; m_i, s² I), so that log Z = 0.

    gmm9        2-D, a 3×3 grid of spacing 5, s = .5, weights 1/45, 2/45, …, 9/45
    gmm40       2-D, 40 equal modes, means uniform in [−40, 40]², s = softplus(1) = 1.3133 (Midgley et al. 2023,
                arXiv:2208.01893); the means are those of the usual seed 0
    gmm40-50d   the same recipe in 50 dimensions
    unequal2d   2-D, two modes 7.5 s apart, weights .7 and .3: a sampler that does not move mass between modes fails it
    gaussian2d  2-D, one correlated Gaussian whose mean is not 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltflow.core.device import beside
from tiltflow.energies.problem import EnergyProblem, Modes
from tiltflow.energies.tempering import Tempering
from tiltflow.problems.tilt import GaussianMixture


@dataclass(frozen=True)
class IsotropicMixture:
    """The energy −log Σ_i w_i N(x; m_i, s² I): weights (M,), means (M, d), both float64, cast to the dtype of x.

    ``GaussianMixture`` has the marginals and covariances; this one is six times faster in 50 dimensions.
    """

    weights: Tensor
    means: Tensor
    std: float

    def __call__(self, x: Tensor) -> Tensor:
        """E(x), (B,), of x (B, d)."""
        squared = (x[:, None] - beside(self.means, x).to(x)).square().sum(-1)
        normaliser = 0.5 * self.means.shape[1] * math.log(2 * math.pi * self.std**2)
        return normaliser - torch.logsumexp(beside(self.weights, x).log().to(x) - squared / (2 * self.std**2), 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n exact draws (n, d) in the default dtype."""
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[i] + self.std * z).to(torch.get_default_dtype())


def _mixture(name: str, energy: IsotropicMixture, scale: float, top: float = 10.0, replicas: int = 8) -> EnergyProblem:
    dim = energy.means.shape[1]
    return EnergyProblem(
        name=name,
        energy=energy,
        event_shape=(dim,),
        scale=scale,
        finest=0.1 * energy.std,
        sample=energy.sample,
        log_z=0.0,
        modes=Modes(energy.means, energy.weights),
        tempering=Tempering(top=top, replicas=replicas),
    )


def gmm9() -> EnergyProblem:
    """Nine modes on a grid, the rarest with 1/45 of the mass, the commonest with 9/45."""
    line = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)
    weights = torch.arange(1, 10, dtype=torch.float64) / 45
    return _mixture("gmm9", IsotropicMixture(weights, torch.cartesian_prod(line, line), 0.5), 5.0, 30.0, 6)


def _gmm40(name: str, dim: int, top: float, replicas: int) -> EnergyProblem:
    uniform = torch.rand((40, dim), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    means = ((uniform - 0.5) * 2 * 40).double()
    std = math.log1p(math.e)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    return _mixture(name, IsotropicMixture(weights, means, std), 30.0, top, replicas)


def gmm40() -> EnergyProblem:
    """Forty equal modes in 2-D. Two pairs are about one s apart; still every centre is the nearest of 1/40, to 7e-4."""
    settings = {"rounds": 120, "batch": 1024, "minibatch": 1024, "steps": 40, "hidden": 128}
    return replace(_gmm40("gmm40", 2, 200.0, 10), settings=settings)


def gmm40_50d() -> EnergyProblem:
    """Forty equal modes in 50-D, all more than 120 standard deviations apart."""
    return _gmm40("gmm40-50d", 50, 1000.0, 40)


def unequal2d() -> EnergyProblem:
    """Weights .7 and .3 at (−3.75, 0) and (3.75, 0), s = 1."""
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    means = torch.tensor([[-3.75, 0.0], [3.75, 0.0]], dtype=torch.float64)
    return _mixture("unequal2d", IsotropicMixture(weights, means, 1.0), scale=4.0)


def gaussian2d() -> EnergyProblem:
    """N((1, −.5), [[1, .6], [.6, .8]])."""
    target = GaussianMixture.gaussian([1.0, -0.5], [[1.0, 0.6], [0.6, 0.8]])

    def energy(x: Tensor) -> Tensor:
        return -target.log_prob(x)

    return EnergyProblem(
        name="gaussian2d", energy=energy, event_shape=(2,), scale=2.0, finest=0.05, sample=target.sample, log_z=0.0
    )
