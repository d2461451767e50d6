r"""Controls: what is learned. A control shifts the mean of a chain, mean_u = mean_base + s_k u_k, u_k = √h u(x_k, t_k).

* :class:`FineTuned` (implicit): a fine-tuned process; u = √(2/η)(v_finetuned − v_base) for the memoryless schedule, and in
  a chain u_k = (B_k/s_k)(X̂_1 finetuned − X̂_1 base).
* :class:`NetworkControl` (explicit): u = σ(t) net(x, t), so the optimal network is −∇V.
* :class:`DriftControl` (explicit, over pure noise): the same, scaled by the noise that is still to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from tiltflow.core.brownian import NoiseChain
from tiltflow.core.chain import Chain, Index, InterpolantChain, at, times
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process, expand


class Control(Protocol):
    """``module`` holds the trained weights."""

    @property
    def module(self) -> nn.Module: ...

    def mean(
        self, chain: Any, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """mean_u(k, x); ``base_mean`` saves a base evaluation when the caller has it."""
        ...

    def ratios(self, chain: Any) -> Tensor | None:
        """ρ_k, (K,): standard deviation of a step over the base's s_k; None where they are the same."""
        ...


@dataclass(frozen=True)
class FineTuned:
    """The implicit control of a fine-tuned process on the chain of its base.

    Raises:
        TiltflowError: its model is not an ``nn.Module``.
    """

    process: Process

    def __post_init__(self) -> None:
        if not isinstance(self.process.model, nn.Module):
            raise TiltflowError(
                f"cannot fine-tune {type(self.process.model).__name__}: only an nn.Module has weights. "
                "Wrap the base with tiltflow.core.control.tilted(base, net) to train a correction of a closed-form model."
            )

    @property
    def module(self) -> nn.Module:
        """The fine-tuned network."""
        assert isinstance(self.process.model, nn.Module)
        return self.process.model

    def mean(
        self, chain: InterpolantChain, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """A_k x + B_k X̂_1 of the fine-tuned process."""
        model = self.process.model
        if base_mean is None or not isinstance(model, Blend | Tilt):
            return chain.mean_of(self.process, k, x, **condition)
        from_x, b = at(chain.a, k, x) * x, at(chain.b, k, x)  # the base is known: only the network is evaluated
        x1 = model.from_base((base_mean - from_x) / b, x, times(chain, k, x), **condition)
        return torch.addcmul(from_x, b, x1)

    def ratios(self, chain: Chain) -> Tensor | None:
        """The base\'s step variance."""
        return None


@dataclass(frozen=True)
class NetworkControl:
    """u = σ(t) net(x, t) on the tangent space: mean_u = mean_base + s_k² net(x, t_k)."""

    module: nn.Module

    def mean(
        self, chain: Chain, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """mean_base + s_k² net(x, t_k, **condition)."""
        if base_mean is None:
            base_mean = chain.base_mean(k, x, **condition)
        field = chain.geometry.project(self.module(x, times(chain, k, x), **condition))
        return base_mean + at(chain.std, k, x) ** 2 * field

    def ratios(self, chain: Chain) -> Tensor | None:
        """The base\'s step variance."""
        return None


class StepVariance(nn.Module):
    r"""A drift network together with v_k/R_k, (K,); v_k is the variance per coordinate of X_1 given X_k under the target.

    Under P* a step of the Brownian base has, with R_k still to come at k, R_k = R_{k+1} + s_k²,

        Var(x_{k+1}|x_k) = s_k² R_{k+1}/R_k + (s_k²/R_k)² v_k

    (bridge plus end point), which is s_k² only if v_k = R_k, the base's own. The moment-matched step leaves an O(step²)
    error where s_k² leaves O(step). ``share`` lives on the grid of ``steps`` uniform times of training; others interpolate.
    """

    share: Tensor

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("share", torch.ones(steps, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """The network moves; the shares stay in float64 on the CPU, where steps are prepared."""
        self.net._apply(fn)
        return self

    def share_at(self, t: Tensor) -> Tensor:
        """v/R at times t in [0, 1), linear between the grid's."""
        place = (double(t) * len(self.share)).clamp_max(len(self.share) - 1)
        low = place.floor().long()
        high = (low + 1).clamp_max(len(self.share) - 1)
        return torch.lerp(self.share[low], self.share[high], place - low)

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The network's field."""
        return self.net(x, t, **condition)


@dataclass(frozen=True)
class DriftControl:
    r"""mean_u = mean_base + s_k² b, b(x, t) = net(x/c, t)/√(R_t + σ_min²), so that the optimal b is −∇V.

    R_t is the noise variance that is still to come (``chain.remaining``): it bounds what is left to decide, so the network's
    output is of order one at every t.

    Args:
        module: net, (x (B, *event), t (B,)) → field; a :class:`StepVariance` has its own step variance besides.
        finest: σ_min. input_scale: c; 1 for networks that measure lengths themselves.
    """

    module: nn.Module
    finest: float
    input_scale: float = 1.0

    def ratios(self, chain: NoiseChain) -> Tensor | None:
        """ρ_k, (K,): standard deviation of a step over the base's, or None if they are the same."""
        if not isinstance(self.module, StepVariance):
            return None
        left, s2 = chain.remaining, chain.std**2
        return (left[1:] / left[:-1] + s2 / left[:-1] * self.module.share_at(chain.t[:-1])).sqrt()

    def drift(self, chain: NoiseChain, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """b(x, t_k)."""
        out = self.module(x / self.input_scale, times(chain, k, x), **condition)
        return chain.geometry.project(out / at(chain.left(self.finest), k, x))

    def mean(self, chain: NoiseChain, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any) -> Tensor:
        """mean_base + s_k² b(x, t_k)."""
        if base_mean is None:
            base_mean = chain.base_mean(k, x)
        return base_mean + at(chain.std, k, x) ** 2 * self.drift(chain, k, x, **condition)


class Blend(nn.Module):
    """X̂_1 = b + β_t (net(x, t) − b) with b the base's X̂_1: how a network that predicts x1 is fine-tuned.

    A change of the velocity by δ moves X̂_1 by (β/W)δ, so velocity, noise and score networks change less and less of X̂_1 as
    t → 1. An x1 network has no such factor: its noise at late steps would be divided by s_k → 0. β_t puts it back.

    Args:
        base: the frozen process, predicting anything; net: module predicting x1, starting at the base.
    """

    def __init__(self, base: Process, net: nn.Module) -> None:
        super().__init__()
        self.base, self.net = base, net

    def from_base(self, b: Tensor, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """X̂_1 of the fine-tuned process, given the base's."""
        return torch.lerp(b, self.net(x, t, **condition), expand(self.base.interpolant.beta(t), b))

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """X̂_1 of the fine-tuned process."""
        return self.from_base(self.base.x1(x, t, **condition), x, t, **condition)


class Tilt(nn.Module):
    """X̂_1 = b + β_t net([x, b], t) with b the base's X̂_1: a trainable correction of a base without weights of its own.

    The optimum is net = (X̂_1* − X̂_1)/β = −(β/α)∇V, bounded on all of [0, 1]. In x it is steep where the base decides
    between modes; b is steep just there, which is why the net sees it. With a zero-initialised last layer it starts at the
    base. ``net`` maps vectors (B, 2d), t (B,) to (B, d).
    """

    def __init__(self, base: Process, net: nn.Module) -> None:
        super().__init__()
        self.base, self.net = base, net

    def from_base(self, b: Tensor, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """X̂_1 of the tilted process, given the base's."""
        return torch.addcmul(b, expand(self.base.interpolant.beta(t), x), self.net(torch.cat([x, b], -1), t, **condition))

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """X̂_1 of the tilted process."""
        return self.from_base(self.base.x1(x, t, **condition), x, t, **condition)


def tilted(base: Process, net: nn.Module) -> Process:
    """The process whose model is :class:`Tilt` (base, net)."""
    return Process(base.interpolant, Tilt(base, net), "x1", base.event_shape)
