r"""Terminal and running costs: the objective is E[∫(½‖u‖² + f) dt + g(X_1)], and p* ∝ p_base · e^{−g} when f = 0.

For a reward r of strength λ, g = −λr. The sign lives here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

Reward = Callable[..., Tensor]


def mean_reward(cost: Cost, value: Tensor) -> float:
    """Mean reward from values of g = −λr, (B,); of −g at strength 0."""
    return float(-value.mean() / (cost.strength or 1.0))


def clip_rows(grad: Tensor, bound: float, each_particle: bool = False) -> Tensor:
    """grad (B, *event) shortened to norm ``bound``, sample by sample, or particle by particle (over the last axis)."""
    rows = grad if each_particle else grad.flatten(1)
    norm = rows.norm(dim=-1).reshape(*rows.shape[:-1], *(1,) * (grad.ndim - rows.ndim + 1))
    return grad * (bound / norm.clamp_min(1e-30)).clamp_max(1.0)


class Cost(Protocol):
    """g and ∇g, and optionally a state cost f(x, t)."""

    @property
    def running(self) -> Callable[[Tensor, Tensor], Tensor] | None: ...

    @property
    def strength(self) -> float:
        """λ of g = −λr; 1 if the cost is no reward's."""
        ...

    @property
    def auxiliary(self) -> dict[str, Any]:
        """What a checkpoint keeps: objects with ``state_dict`` and ``load_state_dict``."""
        ...

    def value(self, x: Tensor, **condition: Any) -> Tensor:
        """g(x), (B,)."""
        ...

    def grad(self, x: Tensor, **condition: Any) -> Tensor:
        """∇g(x), the shape of x."""
        ...


@dataclass(frozen=True)
class RewardCost:
    """g(x) = −λ r(x) for a reward ``(x (B, *event), **condition) -> (B,)`` that autograd can differentiate.

    Args:
        reward: r; strength: λ ≥ 0, the inverse temperature of the tilt p_base · e^{λr}.
        max_grad_norm: per-sample bound on ‖λ∇r‖ (None: none). A clipped gradient is no longer that of r.
        running: a state cost f(x, t) → (B,).

    Raises:
        TiltflowError: λ < 0 or not finite; a reward of the wrong shape, detached, NaN or infinite (at call time).
    """

    reward: Reward
    strength: float = 1.0
    max_grad_norm: float | None = None
    running: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.strength < float("inf")):
            raise TiltflowError(
                f"the strength must be finite and at least 0, got {self.strength}. To lower a reward instead of "
                "raising it, negate the reward."
            )

    @property
    def auxiliary(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def reward_of(self, x: Tensor, **condition: Any) -> Tensor:
        """r(x), checked. The reward is given a copy of x, which it may change."""
        r = self.reward(x.clone(), **condition)
        name = getattr(self.reward, "__name__", type(self.reward).__name__)
        if not isinstance(r, Tensor) or r.shape != x.shape[:1]:
            got = f"shape {tuple(r.shape)}" if isinstance(r, Tensor) else type(r).__name__
            raise TiltflowError(
                f"reward {name!r} returned {got} for a batch of {len(x)}; it must return one number per sample, "
                f"a tensor of shape ({len(x)},)."
            )
        bad = int((~torch.isfinite(r)).sum())
        if bad:
            raise TiltflowError(
                f"reward {name!r} is NaN or infinite for {bad} of {len(x)} samples; it must be finite wherever the base "
                "puts mass. Run `tiltflow check-reward`."
            )
        return r

    def value(self, x: Tensor, **condition: Any) -> Tensor:
        """−λ r(x)."""
        return -self.strength * self.reward_of(x, **condition)

    def grad(self, x: Tensor, **condition: Any) -> Tensor:
        """−λ ∇r(x)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            r = self.reward_of(x, **condition)
            grad = None
            if r.requires_grad:  # with trainable weights it may, and still not depend on x
                (grad,) = torch.autograd.grad(-self.strength * r.sum(), x, allow_unused=True)
            if grad is None:
                raise TiltflowError(
                    "the reward is detached from its input: no gradient reaches x. Remove .detach(), .item(), .numpy(), "
                    "torch.no_grad() and integer casts from it."
                )
        bad = int((~torch.isfinite(grad)).flatten(1).any(1).sum())
        if bad:
            raise TiltflowError(
                f"the reward's gradient is NaN or infinite for {bad} of {len(x)} samples (often sqrt, norm or log at 0). "
                "Run `tiltflow check-reward`."
            )
        if self.max_grad_norm is not None:
            grad = clip_rows(grad, self.max_grad_norm)
        return grad
