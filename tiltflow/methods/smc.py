r"""Sequential Monte Carlo on the paths of a chain: particles are weighted on the way and the light ones are replaced.

    log w += L_{k+1}(x_{k+1}) − L_k(x_k) − h f(x_k, t_k) + log N(x_{k+1}; mean_base, s_k²) − log N(x_{k+1}; mean, ρ_k²s_k²)

with L_0 counted at the start and L_K = −g. The potentials telescope: whatever L_k and the walk's ``mean`` are, a path ends
with e^{−g − Σhf} dP_base/dP, so the target is p_base^chain · e^{−g} and Ẑ is unbiased, resampled or not. L_k and ``mean``
only decide the variance (none if L_k = −V_k and mean = mean_u*). Two presets, both with L_k = λ r(X̂_1(x_k)):

* :func:`feynman_kac`: Feynman–Kac steering (Singhal et al. 2025, arXiv:2501.06848). The walk is the base's, or a control's;
  no gradient of the reward is needed.
* :func:`urge`: Girsanov-weighted SMC (Wang et al. 2026, arXiv:2605.17850). The walk follows the reward's gradient,
  u_k = s_k ∇_x λ r(X̂_1(x_k)), and the last two terms above, −(½‖u_k‖² + u_k·ε_k), pay for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import noise
from tiltflow.core.simulate import actors, running_cost, transition
from tiltflow.core.weights import ess, log_mean_exp, systematic
from tiltflow.methods.guidance import look_ahead
from tiltflow.train.method import TrainingFree, Weighted

Potential = Callable[..., Tensor]


@dataclass(frozen=True)
class PathSMC(TrainingFree):
    """One population of particles per call.

    Args:
        chain: the base as a Gaussian chain. A step of std 0 is the base's own, for every walk.
        cost: g, and the state cost f if it has one.
        potential: L_k, ``(k, x, x1, **condition) -> (B,)`` with x1 = X̂_1(x) (x itself without an interpolant); any
            finite function is exact. None: zero before the end.
        guided: walk up the reward's gradient where no control is given.
        threshold: resample when the effective sample size falls below this fraction; 0: never (importance sampling),
            1: at every step.

    Raises:
        TiltflowError: a threshold outside [0, 1]; at call time, condition rows that differ.
    """

    chain: Chain
    cost: Cost
    potential: Potential | None = None
    guided: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise TiltflowError(f"threshold is a fraction of the particles, in [0, 1]; got {self.threshold}.")

    def sample(self, control: Control | None, n: int, generator: torch.Generator, **condition: Any) -> Weighted:
        """n weighted particles of one condition; the mean of e^{log_weights} is Ẑ, also after resampling."""
        for name, rows in condition.items():
            if isinstance(rows, Tensor) and rows.ndim > 0 and bool((rows != rows[:1]).any()):
                raise TiltflowError(
                    f"the rows of condition {name!r} differ, but particles of one population replace each other: "
                    "call sample once per condition."
                )
        chain, x = self.chain, self.chain.source(n, generator)
        dimension, noisy = chain.geometry.dimension(x.shape[1:]), set(chain.controlled.tolist())
        log_w = torch.zeros(n, dtype=torch.float64)
        counted = torch.zeros_like(log_w)  # L_k, already in log_w
        for k, (actor, ratio) in enumerate(actors(chain, control)):
            guide = self.cost if self.guided and control is None and k in noisy else None
            x1, base_mean, ascent = look_ahead(chain, k, x, guide, **condition)
            with torch.no_grad():
                if self.potential is not None:
                    potential = double(self.potential(k, x, x1, **condition))
                    log_w, counted = log_w + potential - counted, potential
                shift = None if ascent is None else at(chain.std, k, x) ** 2 * ascent
                if ess(log_w) < self.threshold:
                    rows = systematic(log_w, generator)
                    log_w, counted, keep = torch.full_like(log_w, log_mean_exp(log_w)), counted[rows], rows.to(x.device)
                    x, base_mean = x[keep], base_mean[keep]
                    shift = None if shift is None else shift[keep]
                log_w = log_w - double(running_cost(chain, self.cost.running, k, x))
                e = noise(chain.geometry, x, generator)
                step = transition(chain, actor, k, x, e, ratio, condition, True, base_mean, shift)
                log_w, x = log_w + double(step.log_ratio(dimension)), step.x_next
        with torch.no_grad():
            log_w = log_w + self.correction(x, counted, **condition)
        return Weighted(x, log_w.to(x), log_mean_exp(log_w))

    def correction(self, x: Tensor, counted: Tensor, **condition: Any) -> Tensor:
        """−g(x_K) − L_{K−1}: what the last potential got wrong, (n,)."""
        return -double(self.cost.value(x, **condition)) - counted


def reward_ahead(cost: Cost) -> Potential:
    """L_k = λ r(X̂_1(x_k))."""

    def potential(k: int, x: Tensor, x1: Tensor, **condition: Any) -> Tensor:
        return -cost.value(x1, **condition)

    return potential


def feynman_kac(chain: Chain, cost: Cost, threshold: float = 0.5) -> PathSMC:
    """Feynman–Kac steering: the base's walk (or a control's), weights from the change of λ r(X̂_1)."""
    return PathSMC(chain, cost, reward_ahead(cost), threshold=threshold)


def urge(chain: Chain, cost: Cost, threshold: float = 0.5) -> PathSMC:
    """Girsanov-weighted SMC: a walk guided by ∇_x λ r(X̂_1) (or a control's), weights from it and the change of λ r(X̂_1)."""
    return PathSMC(chain, cost, reward_ahead(cost), guided=True, threshold=threshold)
