r"""Reward-gradient guidance: every step's mean is pushed up the reward of the sample it is heading for, without correction.

    mean = mean_u + scale · s_k² ∇_x λ r(X̂_1(x_k)),      ∇_x λ r(X̂_1(x)) = −J_{X̂_1}(x)ᵀ ∇g(X̂_1(x))

Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687) for a general reward. The right shift is −s_k² ∇V, and
−V(x) = log E[e^{λr(X_1)} | x] ≥ λ E[r(X_1) | x]: guidance puts r of the mean in its place. The gradients agree where r is
linear and X_1 given x has a spread that does not depend on x (a Gaussian base), up to O(1/K); elsewhere the law is biased.
:func:`tiltflow.methods.smc.urge` weights the same walk so that it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain, at, times
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import noise
from tiltflow.core.simulate import actors, transition
from tiltflow.train.method import TrainingFree, Weighted


class Ahead(NamedTuple):
    """What one base evaluation at x_k tells, each (B, *event).

    x1: X̂_1(x_k) over an interpolant, x_k itself on other chains. base_mean: of the step. ascent: −∇_x g(x1) on the tangent
    space, or None.
    """

    x1: Tensor
    base_mean: Tensor
    ascent: Tensor | None


def look_ahead(chain: Chain, k: int, x: Tensor, cost: Cost | None = None, **condition: Any) -> Ahead:
    """:class:`Ahead` at x (B, *event); ``cost`` asks for the ascent, one vector–Jacobian product more."""
    x = x.detach().requires_grad_(cost is not None)
    with torch.set_grad_enabled(cost is not None):
        x1 = chain.base.x1(x, times(chain, k, x), **condition) if isinstance(chain, InterpolantChain) else x
    ascent = None
    if cost is not None:
        pull = -cost.grad(x1.detach(), **condition)
        ascent = torch.autograd.grad(x1, x, pull)[0] if x1.requires_grad else torch.zeros_like(x)
        ascent = chain.geometry.project(ascent)
    x, x1 = x.detach(), x1.detach()
    with torch.no_grad():
        mean = chain.mean(k, x, x1) if isinstance(chain, InterpolantChain) else chain.base_mean(k, x, **condition)
    return Ahead(x1, mean, ascent)


@dataclass(frozen=True)
class GradientGuidance(TrainingFree):
    """Biased by construction: the weights it returns are zeros and there is no log Z.

    Args:
        chain: the base as a Gaussian chain. A step of std 0 is not guided.
        cost: g = −λ r, with a gradient.
        scale: factor of the push; 1 is the one that is right on a Gaussian base with a linear reward.

    Raises:
        TiltflowError: a negative or infinite scale.
    """

    chain: Chain
    cost: Cost
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise TiltflowError(f"scale must be finite and at least 0, got {self.scale}: to lower a reward, negate it.")

    def sample(self, control: Control | None, n: int, generator: torch.Generator, **condition: Any) -> Weighted:
        """n guided walks, (n, *event); with a control the push (at the base's X̂_1) comes on top of its mean."""
        chain, x = self.chain, self.chain.source(n, generator)
        noisy = set(chain.controlled.tolist())
        for k, (actor, ratio) in enumerate(actors(chain, control)):
            _, base_mean, ascent = look_ahead(chain, k, x, self.cost if k in noisy else None, **condition)
            shift = None if ascent is None else self.scale * at(chain.std, k, x) ** 2 * ascent
            with torch.no_grad():
                e = noise(chain.geometry, x, generator)
                x = transition(chain, actor, k, x, e, ratio, condition, False, base_mean, shift).x_next
        return Weighted(x, x.new_zeros(n), None)
