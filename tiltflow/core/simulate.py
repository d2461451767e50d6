r"""Simulation: walks along a chain, controlled or not, and the probability-flow ODE.

One walk serves paths (for adjoints), end points (for samples) and path weights. With ε_k ~ N(0, I):

    x_{k+1} = mean_u(k, x_k) + ρ_k s_k ε_k,        s_k u_k = mean_u − mean_base

ρ_k = 1, unless the control has its own step variance (:class:`~tiltflow.core.control.DriftControl`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain, at, times
from tiltflow.core.control import Control
from tiltflow.core.geometry import noise as tangent_noise


class Step(NamedTuple):
    """One transition; ``u`` (scaled: √h times the control) is None if the base mean was not asked for; ``ratio`` is ρ_k."""

    k: int
    x: Tensor
    noise: Tensor
    x_next: Tensor
    mean: Tensor
    u: Tensor | None
    ratio: float = 1.0

    def log_ratio(self, dimension: int) -> Tensor:
        """log p_base/p_u of the transition, −½‖u + ρε‖² + ½‖ε‖² + d log ρ, (B,)."""
        assert self.u is not None
        if self.ratio == 1.0:
            return -event_sum(self.u * (0.5 * self.u + self.noise))
        squares = event_sum(self.noise**2 - (self.u + self.ratio * self.noise) ** 2)
        return 0.5 * squares + dimension * math.log(self.ratio)

    def kl(self, dimension: int) -> Tensor:
        """KL(p_u ‖ p_base) of the transition, ½‖u‖² + d(½(ρ² − 1) − log ρ), (B,)."""
        assert self.u is not None
        return 0.5 * event_sum(self.u**2) + dimension * (0.5 * (self.ratio**2 - 1) - math.log(self.ratio))


class Path(NamedTuple):
    """States (K+1, B, *event) and, per step, the mean the walk used (K, B, *event)."""

    x: Tensor
    mean: Tensor


class Samples(NamedTuple):
    """End points with what their paths say of them, each (B,).

    log_ratio: log dP_base/dP_u of the chain, Σ_k −(½‖u_k‖² + u_k·ε_k) where ρ_k = 1.
    kl: Σ_k ½‖u_k‖² (ρ_k = 1), whose mean estimates KL(P^u ‖ P_base).
    running: Σ_k h f(x_k, t_k) of the cost's state part (zeros without one).
    log_kernel_ratio: Σ_k log q(x_k|x_{k+1}) − log p_0(x_0) − Σ_k log N(x_{k+1}; mean_u, s_k²), or None where the chain
    is not memoryless or ends noiselessly.
    """

    x: Tensor
    log_ratio: Tensor
    kl: Tensor
    running: Tensor
    log_kernel_ratio: Tensor | None


def event_sum(x: Tensor) -> Tensor:
    """Sum over all axes but the first."""
    return x.reshape(x.shape[0], -1).sum(1)


def normal_log_prob(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    """log N(x; mean, std²) summed over the event, (B,); std broadcasts against x."""
    z = (x - mean) / std
    return event_sum(-0.5 * z**2 - (std.log() + 0.9189385332046727).expand_as(x))


def walk(
    chain: Chain,
    control: Control | None,
    x0: Tensor,
    generator: torch.Generator,
    with_base: bool = False,
    **condition: Any,
) -> Iterator[Step]:
    """The transitions of one batch of paths from ``x0``. A step with std 0 is the base's own, noiseless.

    ``control`` None walks the base. ``with_base`` also evaluates the base mean, hence u.
    """
    x, ratios = x0, getattr(control, "ratios", lambda chain: None)(chain)
    for k in range(len(chain.t) - 1):
        std, ratio = at(chain.std, k, x), 1.0 if ratios is None else float(ratios[k])
        if control is None or not bool((chain.std[k] > 0).all()):
            mean = chain.base_mean(k, x, **condition)
            u = torch.zeros_like(x) if with_base else None
        else:
            base_mean = chain.base_mean(k, x, **condition) if with_base else None
            mean = control.mean(chain, k, x, base_mean=base_mean, **condition)
            u = (mean - base_mean) / std if base_mean is not None else None
        noise = tangent_noise(chain.geometry, x, generator)
        x_next = mean + ratio * std * noise
        yield Step(k, x, noise, x_next, mean, u, ratio)
        x = x_next


@torch.no_grad()
def simulate(
    chain: Chain,
    control: Control | None,
    x0: Tensor,
    generator: torch.Generator,
    keep: torch.device | None = None,
    **condition: Any,
) -> Path:
    """Whole paths from ``x0`` (B, *event), without gradients: one network evaluation per step.

    ``keep`` is the device that they are stored on (None: that of ``x0``).
    """
    x = torch.empty((len(chain.t), *x0.shape), dtype=x0.dtype, device=keep or x0.device)
    mean = torch.empty_like(x[1:])
    x[0] = x0
    for s in walk(chain, control, x0, generator, **condition):
        x[s.k + 1], mean[s.k] = s.x_next, s.mean
    return Path(x, mean)


@torch.no_grad()
def sample(
    chain: Chain,
    control: Control | None,
    x0: Tensor,
    generator: torch.Generator,
    running: Callable[[Tensor, Tensor], Tensor] | None = None,
    **condition: Any,
) -> Samples:
    """End points and path log-ratios from ``x0``; paths are not kept. Two network evaluations per step if controlled.

    ``running`` is the state cost f(x, t) → (B,), if the problem has one.
    """
    kernel = isinstance(chain, InterpolantChain) and chain.memoryless and bool((chain.std > 0).all())
    log_ratio, kl, state_cost = (x0.new_zeros(len(x0)) for _ in range(3))
    log_kernel = -normal_log_prob(x0, 0.0, torch.ones_like(x0[:1])) if kernel else None
    x, dimension = x0, chain.geometry.dimension(x0.shape[1:])
    for s in walk(chain, control, x0, generator, with_base=True, **condition):
        x = s.x_next
        kl = kl + s.kl(dimension)
        log_ratio = log_ratio + s.log_ratio(dimension)
        if running is not None:
            h = float(chain.t[s.k + 1] - chain.t[s.k])
            state_cost = state_cost + h * running(s.x, times(chain, s.k, s.x))
        if log_kernel is not None:
            assert isinstance(chain, InterpolantChain)
            rho, variance = chain.noising_kernel(s.k)
            if float(variance) > 0:  # a point source (Föllmer) has no density to compare at x_0
                log_kernel = log_kernel + normal_log_prob(s.x, rho.to(x.dtype) * x, variance.sqrt().to(x.dtype))
            else:
                log_kernel = torch.zeros_like(log_kernel)
            log_kernel = log_kernel - normal_log_prob(x, s.mean, at(chain.std, s.k, x))
    return Samples(x, log_ratio, kl, state_cost, log_kernel)




