r"""Simulation: walks along a chain, controlled or not, and all that is said of their transitions.

One walk serves paths (for adjoints), end points (for samples) and path weights. With ε_k ~ N(0, I) on the tangent space:

    x_{k+1} = mean_u(k, x_k) + ρ_k s_k ε_k,        s_k u_k = mean_u − mean_base

ρ_k = 1, unless the control has its own step variance (:class:`~tiltflow.core.control.DriftControl`). Per transition, d being
the geometry's dimension,

    log p_base/p_u = −½‖u + ρε‖² + ½‖ε‖² + d log ρ,        KL(p_u ‖ p_base) = ½‖u‖² + d(½(ρ² − 1) − log ρ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain, at, cast, times
from tiltflow.core.control import Control
from tiltflow.core.geometry import noise as tangent_noise

Running = Callable[[Tensor, Tensor], Tensor]
ENTRIES = 2**20
"""Of the states that :func:`retrace` sees at once."""


def event_sum(x: Tensor) -> Tensor:
    """Sum over all axes but the first."""
    return x.reshape(x.shape[0], -1).sum(1)


def energy(u: Tensor) -> Tensor:
    """½‖u‖², (B,)."""
    return 0.5 * event_sum(u**2)


def log_ratio(u: Tensor, noise: Tensor, dimension: int, ratio: float | Tensor = 1.0) -> Tensor:
    """log p_base/p_u of transitions, (B,); u, noise (B, *event), ρ a number or one per row, broadcastable against u.

    With ρ = 1 this is log N(x; m, s²) − log N(x; m', s²) of any two means, at x = m' + s·noise and m' = m + s·u.
    """
    if isinstance(ratio, float) and ratio == 1.0:
        return -event_sum(u * (0.5 * u + noise))
    log_rho = math.log(ratio) if isinstance(ratio, float) else ratio.reshape(len(u)).log()
    return 0.5 * event_sum(noise**2 - (u + ratio * noise) ** 2) + dimension * log_rho


def step_kl(u: Tensor, dimension: int, ratio: float | Tensor = 1.0) -> Tensor:
    """KL(p_u ‖ p_base) of transitions, (B,); ρ as in :func:`log_ratio`."""
    if isinstance(ratio, float):
        return energy(u) + dimension * (0.5 * (ratio**2 - 1) - math.log(ratio))
    ratio = ratio.reshape(len(u))
    return energy(u) + dimension * (0.5 * (ratio**2 - 1) - ratio.log())


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
        """log p_base/p_u of the transition, (B,)."""
        assert self.u is not None
        return log_ratio(self.u, self.noise, dimension, self.ratio)

    def kl(self, dimension: int) -> Tensor:
        """KL(p_u ‖ p_base) of the transition, (B,)."""
        assert self.u is not None
        return step_kl(self.u, dimension, self.ratio)


class Path(NamedTuple):
    """States (K+1, B, *event) and, per step, the mean the walk used (K, B, *event)."""

    x: Tensor
    mean: Tensor


class Samples(NamedTuple):
    """End points with what their paths say of them, each (B,).

    log_ratio: log dP_base/dP_u of the chain, Σ_k −(½‖u_k‖² + u_k·ε_k) where ρ_k = 1.
    kl: Σ_k ½‖u_k‖² (ρ_k = 1), whose mean estimates KL(P^u ‖ P_base).
    running: Σ_k h f(x_k, t_k) of the cost's state part (zeros without one).
    log_kernel_ratio: Σ_k log q(x_k|x_{k+1}) − log p_0(x_0) − Σ_k log N(x_{k+1}; mean_u, ρ_k²s_k²), or None where the chain
    is not memoryless or ends noiselessly.
    """

    x: Tensor
    log_ratio: Tensor
    kl: Tensor
    running: Tensor
    log_kernel_ratio: Tensor | None


def normal_log_prob(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    """log N(x; mean, std²) summed over the event, (B,); std broadcasts against x."""
    z = (x - mean) / std
    return event_sum(-0.5 * z**2 - (std.log() + 0.9189385332046727).expand_as(x))


def running_cost(chain: Chain, running: Running | None, k: int, x: Tensor) -> Tensor:
    """h f(x, t_k), (B,); zeros without a state cost f."""
    if running is None:
        return x.new_zeros(len(x))
    return float(chain.t[k + 1] - chain.t[k]) * running(x, times(chain, k, x))


def actors(chain: Chain, control: Control | None) -> list[tuple[Control | None, float]]:
    """Who makes each step, with its ρ_k: the control where there is noise, elsewhere (and with None) the base."""
    if control is None:
        return [(None, 1.0)] * len(chain.std)
    own, noisy = control.ratios(chain), set(chain.controlled.tolist())
    ratios = None if own is None else own.tolist()
    return [
        (control, 1.0 if ratios is None else ratios[k]) if k in noisy else (None, 1.0)
        for k in range(len(chain.std))
    ]


def transition(
    chain: Chain,
    control: Control | None,
    k: int,
    x: Tensor,
    noise: Tensor,
    ratio: float,
    condition: dict[str, Any],
    with_base: bool = False,
    base_mean: Tensor | None = None,
    shift: Tensor | None = None,
) -> Step:
    """One step from given noise, differentiable; ``control`` None is the base.

    Args:
        with_base: evaluate the base mean too, hence u. base_mean: it, if it is known. shift: added to the mean, (B, *event).
    """
    std = at(chain.std, k, x)
    if base_mean is None and (with_base or control is None):
        base_mean = chain.base_mean(k, x, **condition)
    mean = base_mean if control is None else control.mean(chain, k, x, base_mean=base_mean, **condition)
    assert mean is not None
    mean = mean if shift is None else mean + shift
    u = None
    if with_base and base_mean is not None:
        u = torch.zeros_like(x) if mean is base_mean else (mean - base_mean) / std
    return Step(k, x, noise, torch.addcmul(mean, noise, std, value=ratio), mean, u, ratio)


def walk_from(
    start: int,
    chain: Chain,
    control: Control | None,
    x: Tensor,
    generator: torch.Generator,
    with_base: bool,
    condition: dict[str, Any],
) -> Iterator[Step]:
    """:func:`walk` from states ``x`` at step ``start``."""
    makers, chain = actors(chain, control), cast(chain, x)
    for k, (actor, ratio) in list(enumerate(makers))[start:]:
        noise = tangent_noise(chain.geometry, x, generator)
        step = transition(chain, actor, k, x, noise, ratio, condition, with_base)
        yield step
        x = step.x_next


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
    return walk_from(0, chain, control, x0, generator, with_base, condition)


def retrace(chain: Chain, control: Control, path: Path, base_mean: Tensor) -> tuple[Tensor, Tensor]:
    """log dP_base/dP_u and Σ_k KL of stored paths of ``control``, each (B,), from mean_base(x_k) (K, B, *event)."""
    n, dimension, ratios = path.x.shape[1], chain.geometry.dimension(path.x.shape[2:]), control.ratios(chain)
    found = path.x.new_zeros(2, n)
    for steps in chain.controlled.to(found.device).split(max(1, ENTRIES // path.x[0].numel())):
        x_next, mean, base = (v[steps].flatten(0, 1) for v in (path.x[1:], path.mean, base_mean))
        k = steps.repeat_interleave(n)
        std, ratio = at(chain.std, k, mean), 1.0 if ratios is None else at(ratios, k, mean)
        u, noise = (mean - base) / std, (x_next - mean) / (ratio * std)
        terms = torch.stack([log_ratio(u, noise, dimension, ratio), step_kl(u, dimension, ratio)])
        found += terms.reshape(2, len(steps), n).sum(1)
    return found[0], found[1]


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
    for s, x_next, centre in zip(walk(chain, control, x0, generator, **condition), x[1:], mean, strict=True):
        x_next.copy_(s.x_next)
        centre.copy_(s.mean)
    return Path(x, mean)


@torch.no_grad()
def sample(
    chain: Chain,
    control: Control | None,
    x0: Tensor,
    generator: torch.Generator,
    running: Running | None = None,
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
        state_cost = state_cost + running_cost(chain, running, s.k, s.x)
        if log_kernel is not None:
            assert isinstance(chain, InterpolantChain)
            rho, std = chain.noising_kernel
            if std[s.k] > 0:  # a point source (Föllmer) has no density to compare at x_0
                log_kernel = log_kernel + normal_log_prob(s.x, at(rho, s.k, x) * x, at(std, s.k, x))
            else:
                log_kernel = torch.zeros_like(log_kernel)
            log_kernel = log_kernel - normal_log_prob(x, s.mean, s.ratio * at(chain.std, s.k, x))
    return Samples(x, log_ratio, kl, state_cost, log_kernel)
