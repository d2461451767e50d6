r"""Log-variance divergence: make the path weights equal. Needs the reward's values only, no gradient of it.

    min_θ Var_{P^v}[ log dP^θ/dP* ],    log dP^θ/dP* = Σ_k (u_k·z_k − ½‖u_k‖²) + Σ h f + g − V(x_0, 0)

with z_k = (x_{k+1} − mean_base)/s_k along stored paths of any policy v, and u_k = u_θ(x_k, t_k) evaluated again. Nüsken &
Richter 2021, arXiv:2005.05409. At the optimum the variance and the gradient are zero path by path, if the chain can
reach P*. At v = u_θ half the gradient is an unbiased one of KL(P^θ ‖ P*).

V(x_0, 0) is unknown. It drops out of the variance among paths with one start and one condition; for a memoryless chain
it is the same for all starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.core.chain import Chain, at, one_start
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import log_ratio
from tiltflow.core.value import weighted_paths
from tiltflow.train.buffer import Material, condition_rows, conditions_of, repeat_rows
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class LogVariance(Method):
    """One round: ``batch`` paths. A row is one whole path; the loss evaluates the control at all its steps.

    Args:
        chain: the base; cost: g and f, of which only values are used.
        batch: paths per round.
        paths_per_start: paths that share a start x_0 (and condition row) and are compared with each other only. None
            compares all paths, whatever their start: right where V(x_0, 0) is the same for all.
        policy: who simulates: the current "control", or the "base".
        conditions: draws one condition row per start, ``(n, generator) -> {name: (n, …)}``.

    Raises:
        TiltflowError: ``paths_per_start`` is missing where V(x_0, 0) differs (conditions, or a chain that is not memoryless
            with random starts), is below 2, or does not divide ``batch``.
    """

    chain: Chain
    cost: Cost
    batch: int = 128
    paths_per_start: int | None = None
    policy: Literal["control", "base"] = "control"
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        shared = self.paths_per_start
        if shared is not None and (shared < 2 or self.batch % shared):
            raise TiltflowError(f"paths_per_start must be at least 2 and divide batch = {self.batch}, got {shared}.")
        if shared is not None:
            return
        if self.conditions is not None:
            raise TiltflowError("with conditions log Z differs from row to row: pass paths_per_start, e.g. 16.")
        if not (self.chain.memoryless or one_start(self.chain)):
            raise TiltflowError(
                "on a chain that is not memoryless the value of the start differs from path to path and would count as "
                "variance: pass paths_per_start, e.g. 16, or start from one point."
            )

    @property
    def auxiliary(self) -> dict[str, Any]:
        return self.cost.auxiliary

    def collect(self, state: State) -> Round:
        """Simulate; rows x (B, K+1, *event), base_mean (B, K, *event), cost Σ h f + g (B,), start (B,) its number."""
        generator = state.generator
        starts = self.batch if self.paths_per_start is None else self.batch // self.paths_per_start
        copies = self.batch // starts
        drawn = self.conditions(starts, generator) if self.conditions else {}
        condition: dict[str, Any] = {name: v.repeat_interleave(copies, 0) for name, v in drawn.items()}
        x0 = self.chain.source(starts, generator).repeat_interleave(copies, 0)
        with parametrize.cached():
            policy = state.control if self.policy == "control" else None
            paths = weighted_paths(self.chain, policy, self.cost, x0, generator, **condition)
        numbers = torch.arange(starts, device=x0.device).repeat_interleave(copies) + state.iteration * starts
        material: Material = {
            "x": paths.x.transpose(0, 1),
            "base_mean": paths.base_mean.transpose(0, 1),
            "cost": paths.running + paths.terminal,
            "start": torch.zeros_like(numbers) if self.paths_per_start is None else numbers,
            **condition_rows(condition),
        }
        return Round(material, paths.metrics(self.cost), {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Sample variance of log dP^θ/dP* among paths of the same start, pooled over the starts."""
        gap = path_log_ratio(control, self.chain, material) + material["cost"]
        number, row = material["start"].unique(return_inverse=True)
        count = torch.bincount(row, minlength=len(number)).to(gap)
        mean = torch.zeros_like(count).index_add(0, row, gap) / count
        return (gap - mean[row]).square().sum() / (count - 1).sum().clamp_min(1.0)


def path_log_ratio(control: Control, chain: Chain, material: Material) -> Tensor:
    """log dP^θ/dP_base of stored paths, (B,), differentiable in the control's weights."""
    x, base_mean = material["x"], material["base_mean"]
    noisy, ratios = chain.controlled.to(x.device), control.ratios(chain)
    paths, steps = len(x), len(noisy)

    def flat(v: Tensor, k: Tensor) -> Tensor:  # step by step, as the paths were drawn
        return v.transpose(0, 1)[k].flatten(0, 1)

    condition = repeat_rows(conditions_of(material), steps)
    here, after, base = flat(x, noisy), flat(x, noisy + 1), flat(base_mean, noisy)
    k = noisy.repeat_interleave(paths)
    std, ratio = at(chain.std, k, here), 1.0 if ratios is None else at(ratios, k, here)
    mean = control.mean(chain, k, here, base_mean=base, **condition)
    u, noise = (mean - base) / std, (after - mean) / (ratio * std)
    terms = log_ratio(u, noise, chain.geometry.dimension(x.shape[2:]), ratio)
    return -terms.reshape(steps, paths).sum(0)
