r"""Analytic problems: bases, rewards and controls whose every quantity has a closed form.

A Gaussian mixture stays one under noising, under an exponential of a quadratic, and under both, so for a memoryless base

    p*_1 ∝ p_1 e^{r},   V(x, t) = log p_t(x) − log p*_t(x) − log Z,   u* = σ∇log(p*_t/p_t),

with p_t and p*_t the noised base and tilt. Tests, benchmarks and docs share these objects. All tensors are float64 and are
cast to the dtype of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant, Linear
from tiltflow.core.process import Process


def _tensor(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianMixture:
    """Σ_i w_i N(m_i, C_i) in d dimensions: weights (M,), means (M, d), covariances (M, d, d)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def isotropic(cls, weights: object, means: object, std: float) -> GaussianMixture:
        """Components with covariance std² I."""
        m = _tensor(means)
        return cls(_tensor(weights), m, std**2 * torch.eye(m.shape[1], dtype=torch.float64).expand(len(m), -1, -1))

    @classmethod
    def gaussian(cls, mean: object, covariance: object) -> GaussianMixture:
        """A single Gaussian."""
        return cls(_tensor([1.0]), _tensor(mean)[None], _tensor(covariance)[None])

    @cached_property
    def _frames(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]]:
        return {}

    def _frame(self, x: Tensor) -> tuple[Tensor, ...]:
        """Eigenvalues and means in the eigenbases (M, d, 1), these (d, M·d), log w − (d/2) log 2π (M, 1), means (M, d)."""
        if (key := (x.dtype, x.device)) not in self._frames:
            values, vectors = torch.linalg.eigh(self.covariances)
            turned = torch.einsum("md,mde->me", self.means, vectors)
            constant = self.weights.log() - 0.5 * math.log(2 * math.pi) * self.means.shape[1]
            frame = values[..., None], turned[..., None], vectors.transpose(0, 1).flatten(1), constant[:, None], self.means
            self._frames[key] = tuple(e.to(x) for e in frame)
        return self._frames[key]

    def _projected(self, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals over variances in each component's eigenbasis, (M, d, B), and log component densities (M, B)."""
        values, turned, vectors, constant, _ = self._frame(x)
        z = torch.addcmul((vectors.T @ x.T).view(*turned.shape[:2], -1), alpha, turned, value=-1)
        variance = torch.addcmul(beta**2, alpha**2, values)
        scaled = z / variance
        return scaled, torch.sub(constant, torch.addcmul(variance.log(), z, scaled).sum(1), alpha=0.5)

    def _mixed(self, share: Tensor, z: Tensor) -> Tensor:
        """Σ_i ϖ_i z_i (B, d) of responsibilities ϖ (M, B) and vectors z (M, d, B) in the components' eigenbases."""
        return (share[:, None] * z).flatten(0, 1).T @ self._frame(z)[2].T

    def log_prob(self, x: Tensor, t: Tensor | None = None, interpolant: Interpolant | None = None) -> Tensor:
        """log p_t(x), (B,); t None is t = 1."""
        alpha, beta = _coefficients(x, t, interpolant)
        return torch.logsumexp(self._projected(x, alpha, beta)[1], 0)

    def x1(self, x: Tensor, t: Tensor, interpolant: Interpolant) -> Tensor:
        """E[X_1 | X_t = x] = Σ_i ϖ_i(x) (m_i + αC_i(α²C_i + β²)⁻¹(x − αm_i))."""
        alpha, beta = _coefficients(x, t, interpolant)
        scaled, log_prob = self._projected(x, alpha, beta)
        values, *_, means = self._frame(x)
        share = torch.softmax(log_prob, 0)
        return torch.addmm(self._mixed(share, alpha * values * scaled), share.T, means)

    def score(self, x: Tensor, t: Tensor | None = None, interpolant: Interpolant | None = None) -> Tensor:
        """∇log p_t(x)."""
        alpha, beta = _coefficients(x, t, interpolant)
        scaled, log_prob = self._projected(x, alpha, beta)
        return self._mixed(torch.softmax(log_prob, 0), -scaled)

    def component(self, x: Tensor) -> Tensor:
        """Index of the most likely component at t = 1, (B,)."""
        return self._projected(x, *_coefficients(x, None, None))[1].argmax(0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n exact draws (n, d) in the default dtype."""
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        x = self.means[i] + torch.einsum("bde,be->bd", torch.linalg.cholesky(self.covariances)[i], z)
        return x.to(torch.get_default_dtype())

    def moments(self, t: float, interpolant: Interpolant) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of p_t."""
        time = _tensor(t)
        alpha, beta = interpolant.alpha(time), interpolant.beta(time)
        mean = self.weights @ self.means
        centred = self.means - mean
        between = torch.einsum("m,md,me->de", self.weights, centred, centred)
        covariance = torch.einsum("m,mde->de", self.weights, self.covariances) + between
        return alpha * mean, alpha**2 * covariance + beta**2 * torch.eye(len(mean), dtype=torch.float64)


def _coefficients(x: Tensor, t: Tensor | None, interpolant: Interpolant | None) -> tuple[Tensor, Tensor]:
    if t is None or interpolant is None:
        return x.new_ones(len(x)), x.new_zeros(len(x))
    return interpolant.alpha(t).to(x), interpolant.beta(t).to(x)


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = c + b·x − ½xᵀQx with Q symmetric (d, d), b (d,)."""

    linear: Tensor
    quadratic: Tensor
    constant: float = 0.0

    @classmethod
    def of_direction(cls, direction: object) -> QuadraticReward:
        """The linear reward b·x."""
        b = _tensor(direction)
        return cls(b, torch.zeros(len(b), len(b), dtype=torch.float64))

    @classmethod
    def log_likelihood(cls, operator: Tensor, observation: Tensor, std: float) -> QuadraticReward:
        """r(x) = log N(o; Hx, std² I), H (m, d), o (m,)."""
        h, o = _tensor(operator), _tensor(observation)
        constant = -0.5 * float(o @ o) / std**2 - len(o) * (math.log(std) + 0.5 * math.log(2 * math.pi))
        return cls(h.T @ o / std**2, h.T @ h / std**2, constant)

    def __call__(self, x: Tensor) -> Tensor:
        """Reward (B,) of x (B, d)."""
        return self.constant + x @ self.linear.to(x) - 0.5 * ((x @ self.quadratic.to(x)) * x).sum(1)

    def tilt(self, base: GaussianMixture, strength: float = 1.0) -> tuple[GaussianMixture, float]:
        """p_base e^{λr}/Z and log Z. Raises TiltflowError if the tilt is not normalisable."""
        precision = torch.linalg.inv(base.covariances)
        tilted_precision = precision + strength * self.quadratic
        if not bool((torch.linalg.eigvalsh(tilted_precision) > 0).all()):
            raise TiltflowError("p_base·exp(λr) is not normalisable: the reward grows faster than the base decays.")
        covariance = torch.linalg.inv(tilted_precision)
        pull = torch.einsum("mde,me->md", precision, base.means) + strength * self.linear
        means = torch.einsum("mde,me->md", covariance, pull)
        log_w = (
            base.weights.log()
            + 0.5 * (torch.logdet(covariance) - torch.logdet(base.covariances))
            + 0.5 * (pull * means).sum(1)
            - 0.5 * torch.einsum("md,mde,me->m", base.means, precision, base.means)
            + strength * self.constant
        )
        log_z = torch.logsumexp(log_w, 0)
        return GaussianMixture((log_w - log_z).exp(), means, covariance), float(log_z)


@dataclass(frozen=True)
class TiltProblem:
    """A mixture base, a quadratic reward, and everything the tilt implies (λ = 1: scale the reward instead)."""

    name: str
    base: GaussianMixture
    reward: QuadraticReward
    interpolant: Interpolant = field(default_factory=Linear)

    @cached_property
    def _tilt(self) -> tuple[GaussianMixture, float]:
        return self.reward.tilt(self.base)

    @property
    def target(self) -> GaussianMixture:
        """p* = p_base e^r / Z."""
        return self._tilt[0]

    @property
    def log_z(self) -> float:
        """log Z = log E_base e^r."""
        return self._tilt[1]

    def process(self) -> Process:
        """The base process, X̂_1 in closed form."""
        return self._process(self.base)

    def optimal(self) -> Process:
        """The optimally fine-tuned process (for the memoryless schedule)."""
        return self._process(self.target)

    def _process(self, mixture: GaussianMixture) -> Process:
        def x1(x: Tensor, t: Tensor) -> Tensor:
            return mixture.x1(x, t, self.interpolant)

        return Process(self.interpolant, x1, "x1", (mixture.means.shape[1],))

    def value(self, x: Tensor, t: Tensor) -> Tensor:
        """V(x, t) = −log E_base[e^r | X_t = x]."""
        return self.base.log_prob(x, t, self.interpolant) - self.target.log_prob(x, t, self.interpolant) - self.log_z

    def control(self, x: Tensor, t: Tensor) -> Tensor:
        """u*(x, t) = −σ∇V with σ² = 2η; t in (0, 1)."""
        sigma = (2 * self.interpolant.eta(t)).sqrt().to(x)[:, None]
        s_star, s_base = (m.score(x, t, self.interpolant) for m in (self.target, self.base))
        return sigma * (s_star - s_base)

    def log_target(self, x: Tensor) -> Tensor:
        """log p̃* = log p_base + r, unnormalised by log Z (B,)."""
        return self.base.log_prob(x) + self.reward(x)


def three_modes() -> GaussianMixture:
    """The 2-D base of the tilt benchmark."""
    return GaussianMixture.isotropic([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], 0.35)


def mixture2d() -> TiltProblem:
    """Three modes and a mild linear reward: tilted weights .227/.271/.502, log Z .0055."""
    return TiltProblem("mixture2d", three_modes(), QuadraticReward.of_direction([-0.4, -0.3]))


def mixture2d_rare() -> TiltProblem:
    """The same base tilted so that one mode keeps 1.1 %: weights .859/.130/.011, log Z 1.120."""
    return TiltProblem("mixture2d-rare", three_modes(), QuadraticReward.of_direction([0.8, 0.6]))


def mixture32d() -> TiltProblem:
    """Four unequal modes in 32 dimensions, means of norm 3 in fixed random directions, linear reward."""
    generator = torch.Generator().manual_seed(32)
    means = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    means = 3 * means / means.norm(dim=1, keepdim=True)
    direction = 0.2 * (means[3] - means[0])
    return TiltProblem(
        "mixture32d", GaussianMixture.isotropic([0.4, 0.3, 0.2, 0.1], means, 0.5), QuadraticReward.of_direction(direction)
    )


def quadratic2d() -> TiltProblem:
    """Three modes and r = b·x − ½xᵀQx with an anisotropic Q."""
    q = _tensor([[0.5, 0.3], [0.3, 1.0]])
    return TiltProblem("quadratic2d", three_modes(), QuadraticReward(_tensor([-0.3, 0.4]), q))


def inverse4d() -> TiltProblem:
    """A linear-Gaussian inverse problem: r = log N(o; Hx, .5²) with two observations of a 4-D two-mode prior."""
    prior = GaussianMixture(
        _tensor([0.6, 0.4]),
        _tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.5, -0.5]]),
        torch.stack([torch.diag(_tensor([0.3, 0.5, 0.4, 0.6])), torch.diag(_tensor([0.5, 0.3, 0.6, 0.4]))]),
    )
    operator = _tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    reward = QuadraticReward.log_likelihood(operator, _tensor([0.2, 0.4]), 0.5)
    return TiltProblem("inverse4d", prior, reward)


TILT_PROBLEMS = {p.__name__.replace("_", "-"): p for p in (mixture2d, mixture2d_rare, mixture32d, quadratic2d, inverse4d)}


@dataclass(frozen=True)
class LinearQuadratic:
    r"""dX = (AX + σu) dt + σ dB, cost ∫(½‖u‖² + XᵀPX) dt + XᵀQX, on [0, T].

    V(x, t) = xᵀF_t x + c_t, u* = −2σF_t x, with the Riccati equation Ḟ = −AᵀF − FA + 2σ²F² − P, F_T = Q, and
    ċ = −σ² tr F, c_T = 0. Solved through the matrix exponential of its Hamiltonian.
    """

    drift: Tensor
    state_cost: Tensor
    terminal: Tensor
    sigma: float
    horizon: float = 1.0

    def riccati(self, t: float) -> Tensor:
        """F_t (d, d): F = ΛY⁻¹ with d/dt (Y, Λ) = [[A, −2σ²I], [−P, −Aᵀ]] (Y, Λ), (Y, Λ)_T = (I, Q)."""
        d = len(self.drift)
        eye = torch.eye(d, dtype=torch.float64)
        hamiltonian = torch.cat(
            [
                torch.cat([self.drift, -2 * self.sigma**2 * eye], 1),
                torch.cat([-self.state_cost, -self.drift.T], 1),
            ]
        )
        end = torch.cat([eye, self.terminal])
        both = torch.linalg.matrix_exp(hamiltonian * (t - self.horizon)) @ end
        return both[d:] @ torch.linalg.inv(both[:d])

    def constant(self, t: float, points: int = 2001) -> float:
        """c_t = ∫_t^T σ² tr F ds (trapezoid)."""
        grid = torch.linspace(t, self.horizon, points, dtype=torch.float64)
        traces = torch.stack([self.riccati(float(s)).trace() for s in grid])
        return self.sigma**2 * float(torch.trapezoid(traces, grid))

    def value(self, x: Tensor, t: float) -> Tensor:
        """V(x, t), (B,)."""
        return ((x @ self.riccati(t).to(x)) * x).sum(1) + self.constant(t)

    def control(self, x: Tensor, t: float) -> Tensor:
        """u*(x, t) = −2σF_t x."""
        return -2 * self.sigma * x @ self.riccati(t).to(x)
