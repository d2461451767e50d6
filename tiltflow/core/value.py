r"""Values and objectives by simulation, and paths that remember their weight.

    V(x, t_k) = −log E_base[ e^{−W_k} | x_k = x ] = −log E_u[ e^{−W_k} dP_base/dP_u | x_k = x ],    W_k = Σ_{j≥k} h f + g
    J(u) = E_u[ Σ ½‖u_k‖² + h f + g ] = E V(x_0, 0) + KL(P^u ‖ P*)

Everything is that of the chain: against the process behind it the values keep the chain's discretisation error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import noise as tangent_noise
from tiltflow.core.simulate import Step, actors, running_cost, sample, walk, walk_from
from tiltflow.core.weights import ess


class Estimate(NamedTuple):
    """Estimates and their standard errors, (m,)."""

    value: Tensor
    error: Tensor


class Objective(NamedTuple):
    """J with its standard error, and the means of its three parts: ½‖u‖², f and g."""

    value: float
    error: float
    energy: float
    running: float
    terminal: float


class WeightedPaths(NamedTuple):
    """Simulated paths and what they cost.

    x: (K+1, B, *event); base_mean: mean_base(x_k), (K, B, *event). Each (B,): terminal g; running Σ h f; energy Σ ½‖u_k‖²;
    log_weight −Σ h f − g + log dP_base/dP_u, so that weights ∝ e^{log_weight} turn the paths into draws of P*.
    """

    x: Tensor
    base_mean: Tensor
    terminal: Tensor
    running: Tensor
    energy: Tensor
    log_weight: Tensor

    def metrics(self, cost: Cost) -> dict[str, float]:
        """Mean reward and KL to the base of the walk, and the effective sample size of its weights."""
        return {
            "reward": mean_reward(cost, self.terminal),
            "kl": float(self.energy.mean()),
            "ess": ess(self.log_weight),
        }


@torch.no_grad()
def weighted_paths(
    chain: Chain, control: Control | None, cost: Cost, x0: Tensor, generator: torch.Generator, **condition: Any
) -> WeightedPaths:
    """Paths from ``x0`` (B, *event) under ``control`` (None: the base), with the cost's values only, never its gradient."""
    states, means, dimension = [x0], [], chain.geometry.dimension(x0.shape[1:])
    running, energy, log_ratio = (x0.new_zeros(len(x0)) for _ in range(3))
    for s in walk(chain, control, x0, generator, with_base=True, **condition):
        assert s.u is not None
        running = running + running_cost(chain, cost.running, s.k, s.x)
        energy, log_ratio = energy + s.kl(dimension), log_ratio + s.log_ratio(dimension)
        states.append(s.x_next)
        means.append(s.mean - at(chain.std, s.k, s.x) * s.u)
    terminal = cost.value(states[-1], **condition).detach()
    log_weight = log_ratio - running - terminal
    return WeightedPaths(torch.stack(states), torch.stack(means), terminal, running, energy, log_weight)


@torch.no_grad()
def value(
    chain: Chain,
    cost: Cost,
    x: Tensor,
    k: int,
    n: int,
    generator: torch.Generator,
    control: Control | None = None,
    **condition: Any,
) -> Estimate:
    """V(x, t_k) of each row of x (m, *event) from n paths each; conditions have m rows.

    ``control`` (None: the base) simulates the paths, and path weights undo it: near u* the error vanishes. The error is
    that of the delta method; −log of a mean is too large by about half its square.

    Raises:
        TiltflowError: k is no step of the chain, or fewer than two paths.
    """
    steps = len(chain.t) - 1
    if not 0 <= k <= steps or n < 2:
        raise TiltflowError(f"value needs a step k in 0…{steps} and n ≥ 2 paths per row; got k = {k}, n = {n}.")
    condition = {name: v.repeat_interleave(n, 0) for name, v in condition.items()}
    y = x.repeat_interleave(n, 0)
    log_w, dimension = y.new_zeros(len(y)), chain.geometry.dimension(x.shape[1:])
    for s in walk_from(k, chain, control, y, generator, True, condition):
        log_w = log_w - running_cost(chain, cost.running, s.k, s.x) + s.log_ratio(dimension)
        y = s.x_next
    log_w = double(log_w - cost.value(y, **condition)).reshape(len(x), n)
    first, second = torch.logsumexp(log_w, 1), torch.logsumexp(2 * log_w, 1)
    spread = (n * (second - 2 * first).exp() - 1).clamp_min(0.0)  # 1/ESS − 1
    return Estimate(math.log(n) - first, (spread / n).sqrt())


@torch.no_grad()
def objective(
    chain: Chain, control: Control | None, cost: Cost, n: int, generator: torch.Generator, **condition: Any
) -> Objective:
    """J of a control from n ≥ 2 paths; conditions have n rows.

    Averages −log_weight, i.e. Σ ½‖u_k‖² + u_k·ε_k + h f + g: the martingale Σ u_k·ε_k has mean zero, and at u* the sum is
    V(x_0, 0) path by path.
    """
    runs = sample(chain, control, chain.source(n, generator), generator, cost.running, **condition)
    terminal = cost.value(runs.x, **condition)
    total = double(runs.running + terminal - runs.log_ratio)
    parts = (float(double(v).mean()) for v in (runs.kl, runs.running, terminal))
    return Objective(float(total.mean()), float(total.std()) / math.sqrt(n), *parts)


@torch.no_grad()
def reversed_log_ratio(chain: BrownianChain, control: Control, x1: Tensor, generator: torch.Generator) -> Tensor:
    """log dP_base/dP_u of paths drawn backwards from end points x1 (B, *event), from the bridge of a base that starts at 0.

    If x1 ~ p*, the paths are draws of P*, and log w = log_ratio − g(x1) seen from there: E*[log w] ≥ log Z (the upper bound,
    EUBO), 1/Z = E*[1/w], and the forward effective sample size 1/(E*[w] E*[1/w]).

    Raises:
        TiltflowError: a chain with a random source.
    """
    if chain.initial is not None:
        raise TiltflowError("paths can be reversed exactly for a base that starts at the point 0 only.")
    x_next = chain.geometry.lift(x1, chain.end_variance, generator)
    log_ratio = x1.new_zeros(len(x1))
    dimension = chain.geometry.dimension(chain.event_shape)
    for k, (_, ratio) in reversed(list(enumerate(actors(chain, control)))):
        shrink = chain.variance[k] / chain.variance[k + 1]
        spread = float((chain.variance[k] * (1 - shrink)).sqrt())
        x = float(shrink) * x_next + spread * tangent_noise(chain.geometry, x_next, generator)
        std = at(chain.std, k, x)
        u = (control.mean(chain, k, x) - x) / std
        step = Step(k, x, ((x_next - x) / std - u) / ratio, x_next, x + std * u, u, ratio)
        log_ratio += step.log_ratio(dimension)
        x_next = x
    return log_ratio
