r"""End points as training material: drawn, kept, and re-noised to any step of a memoryless chain.

At the optimum P*(X_t | X_1) is the noising kernel, so x_t = αX_1 + βX_0 with fresh X_0 ~ N(0, I).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import Chain, Index, InterpolantChain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant
from tiltflow.core.simulate import Samples, sample
from tiltflow.train.buffer import Material, conditions_of, repeat_rows
from tiltflow.train.method import Conditions


class Ends(NamedTuple):
    """End points of simulated paths: what ``sample`` says of them, g(x_1) (B,), conditions, and the round's metrics."""

    samples: Samples
    cost: Tensor
    condition: dict[str, Tensor]
    metrics: dict[str, float]


class Projected(NamedTuple):
    """End points re-noised to steps: x = αx_1 + βx_0 and x_0 (n, *event), k (n,), base_mean at x, conditions."""

    x: Tensor
    k: Tensor
    x0: Tensor
    base_mean: Tensor
    condition: dict[str, Tensor]


def require_memoryless(chain: Chain) -> InterpolantChain:
    """The chain, if end points can be re-noised on it. Raises TiltflowError without an interpolant, or if not memoryless."""
    if not isinstance(chain, InterpolantChain) or not chain.memoryless:
        raise TiltflowError(
            "end points can be re-noised on the memoryless chain of an interpolant only; build it with "
            "memoryless_chain(...), not with euler_maruyama, a drift or pure noise."
        )
    return chain


def require_reciprocal(chain: Chain, cost: Cost) -> InterpolantChain:
    """The chain, if end points are all a method needs. Raises TiltflowError as above, or with a running cost."""
    memoryless = require_memoryless(chain)
    if cost.running is not None:
        raise TiltflowError("the cost has a running part f: only whole paths know it. Use AdjointMatching.")
    return memoryless


def require_brownian(method: object, chain: Chain) -> None:
    """Raises TiltflowError unless ``chain`` has the bridges of a Brownian motion, which ``method`` draws from."""
    if not isinstance(chain, BrownianChain):
        raise TiltflowError(
            f"{type(method).__name__} draws from the bridges of a Brownian chain (geometric_chain, constant_chain); "
            f"it cannot use {type(chain).__name__}."
        )


def draw_ends(
    chain: Chain, cost: Cost, control: Control | None, batch: int, generator: torch.Generator, conditions: Conditions | None
) -> Ends:
    """``batch`` end points of the control (of the base if None); only values of the cost are used."""
    condition: dict[str, Any] = conditions(batch, generator) if conditions else {}
    with torch.no_grad(), parametrize.cached():
        samples = sample(chain, control, chain.source(batch, generator), generator, **condition)
        value = cost.value(samples.x, **condition).detach()
    return Ends(samples, value, condition, {"reward": mean_reward(cost, value), "kl": float(samples.kl.mean())})


@torch.no_grad()
def renoise(chain: InterpolantChain, k: Tensor, x1: Tensor, generator: torch.Generator, **condition: Tensor) -> Projected:
    """x_k ~ q(· | x_1) for one step per row, k (n,), and the base's mean there."""
    path = chain.base.interpolant
    x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    x = at(path.alpha(chain.t), k, x1) * x1 + at(path.beta(chain.t), k, x1) * x0
    return Projected(x, k, x0, chain.base_mean(k, x, **condition), condition)


def project(
    chain: InterpolantChain, material: Material, draws: int, generator: torch.Generator
) -> tuple[Material, Projected]:
    """Each row of end points ``draws`` times over, each re-noised to a controlled step drawn uniformly."""
    rows = repeat_rows(material, draws)
    steps = chain.controlled.to(generator.device)
    pick = torch.randint(len(steps), (len(rows["x1"]),), generator=generator, device=generator.device)
    return rows, renoise(chain, steps[pick], rows["x1"], generator, **conditions_of(rows))


def toward(chain: InterpolantChain, k: Index, x: Tensor, x1: Tensor, mean: Tensor) -> Tensor:
    """(A_k x + B_k x1 − mean)/s_k²: the pull of an end point x1 on the step, relative to ``mean``.

    Minus this, with ``mean`` the base's, is an end point as a target a_{k+1}.
    """
    return (chain.mean(k, x, x1) - mean) / at(chain.std, k, x) ** 2


def residual_variances(chain: InterpolantChain) -> Tensor:
    """v_k = E tr Var(X_1|X_k)/d of the base that the chain was built with, (K,) or (K, *event), read off its s_k²."""
    path = chain.base.interpolant
    alpha, beta2 = path.alpha(chain.t), path.beta(chain.t) ** 2
    shrink = torch.where(beta2[:-1] > 0, beta2[1:] / beta2[:-1].clamp_min(1e-300), 0.0)
    bridge = beta2[1:] * (1 - (alpha[:-1] / alpha[1:]) ** 2 * shrink)
    return (chain.std**2 - bridge.reshape(-1, *(1,) * (chain.std.ndim - 1))) / chain.b**2


def end_variance(chain: InterpolantChain) -> float:
    """S: the variance of the base's end points, mean over coordinates, from 1/v_0 = 1/S + α_0²/β_0²."""
    v = float(residual_variances(chain)[0].mean())
    return v / (1 - v * float(snr(chain.base.interpolant, chain.t[:1])))


def snr(path: Interpolant, t: Tensor) -> Tensor:
    """α²/β², 0 at a point source."""
    return torch.nan_to_num(path.alpha(t) ** 2 / path.beta(t) ** 2, nan=0.0, posinf=float("inf"))  # a point source: 0/0 is 0
