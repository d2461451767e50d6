r"""Policy gradient: the steps of a chain are Gaussian actions, and actions that led to a better end become more likely.

With log π_k = log N(x_{k+1}; mean_θ(x_k), ρ_k²s_k²), advantages A_k held fixed and weight β of the KL to the base,

    L = E Σ_k [ −min(ϱ_k A_k, clamp(ϱ_k, 1 ± c) A_k) + β ½‖u_k(x_k)‖² ],     ϱ_k = π_k/π_k^collected.

* :func:`reinforce`: A_k = −(g + Σ_{j>k} (½‖u_j‖² + h f_j)) − baseline, β = 1. Where collected, ∇L is an unbiased estimate of
  ∇J, J = E[Σ(½‖u_k‖² + h f) + g].
* :func:`flow_grpo`: Flow-GRPO (Liu et al. 2025, arXiv:2505.05470). A_k = −(g − group mean)/group std for all k. Biased
  twice: λ cancels in A, so the strength is 1/(β · std of r), which moves as training does; and what an action adds to the KL
  of later steps is left out.

The reward's values are enough; its gradient is never asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import energy, log_ratio, running_cost, walk
from tiltflow.train.buffer import Material, condition_rows, conditions_of, repeat_rows
from tiltflow.train.distributed import everyone, own, world
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class PolicyGradient(Method):
    """One round: ``batch`` paths in groups that share a condition; rows are their controlled steps.

    Args:
        chain: the base as a Gaussian chain; memoryless for fine-tuning.
        cost: g, and the state cost f if it has one. Values only.
        batch: paths per round.
        group: paths that are compared with one another, with one condition row for all of them (None: the whole batch).
        kl: β.
        future_kl: count the KL of later steps in A_k. With it the objective is E[g + Σ h f] + β KL, without it none.
        normalise: divide A by the group's standard deviation.
        clip: c, the bound on how far the ratio may reward a move when a round is used for several gradient steps (None: no
            bound). The ratio is of whole states: the more dimensions, the sooner it binds.
        conditions: draws one condition row per group, ``(n, generator) -> {name: (n, …)}``.

    Raises:
        TiltflowError: a group of less than two paths, or one that does not divide the batch; negative kl or clip.
    """

    chain: Chain
    cost: Cost
    batch: int = 64
    group: int | None = None
    kl: float = 1.0
    future_kl: bool = True
    normalise: bool = False
    clip: float | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        if self._group < 2 or self.batch % self._group:
            raise TiltflowError(
                f"group = {self._group} of batch = {self.batch}: a path is judged against the others of its group, so a "
                "group needs at least two paths and must divide the batch."
            )
        if self.kl < 0 or (self.clip is not None and self.clip <= 0):
            raise TiltflowError(f"kl must be at least 0 and clip above 0, got kl={self.kl}, clip={self.clip}.")

    @property
    def auxiliary(self) -> dict[str, Any]:
        return self.cost.auxiliary

    @property
    def _group(self) -> int:
        return self.batch if self.group is None else self.group

    @torch.no_grad()
    def collect(self, state: State) -> Round:
        """Simulate, and lay out (x_k, k, x_{k+1}, A_k) of the controlled steps as rows."""
        generator, chain = state.generator, self.chain
        condition: dict[str, Any] = {}
        if self.conditions:
            rows = self.conditions(self.batch // self._group, generator)
            condition = {name: v.repeat_interleave(self._group, 0) for name, v in rows.items()}
        x0 = chain.source(self.batch, generator)
        with parametrize.cached():
            steps = list(walk(chain, state.control, x0, generator, with_base=True, **condition))
        cost = double(self.cost.value(steps[-1].x_next, **condition))
        kl, dimension, noisy = torch.zeros_like(cost), chain.geometry.dimension(x0.shape[1:]), set(chain.controlled.tolist())
        to_go, columns = cost, []
        spent = double(torch.stack([s.kl(dimension) for s in steps]))
        ran = double(torch.stack([running_cost(chain, self.cost.running, s.k, s.x) for s in steps]))
        for s in reversed(steps):
            assert s.u is not None
            if s.k in noisy:
                base_mean = s.mean - at(chain.std, s.k, s.x) * s.u
                row = {"x": s.x, "x_next": s.x_next, "mean": s.mean, "base_mean": base_mean}
                k = torch.full((self.batch,), s.k, device=x0.device)
                columns.append(row | {"k": k, "advantage": self._advantage(to_go)})
            kl = kl + spent[s.k]
            if self.future_kl:
                to_go = to_go + self.kl * spent[s.k]
            to_go = to_go + ran[s.k]
        material = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        material["advantage"] = material["advantage"].to(x0)
        material |= repeat_rows(condition_rows(condition), len(columns))
        return Round(material, {"reward": mean_reward(self.cost, cost), "kl": float(kl.mean())}, {})

    def _advantage(self, to_go: Tensor) -> Tensor:
        """−(cost to go − its mean over the others of the group), or the group's z-score; (batch,)."""
        size = world().size if self.group is None else 1  # a round that is one group is that of all processes
        groups = (everyone(to_go) if self.group is None else to_go).reshape(-1, self._group * size)
        centred = groups - groups.mean(1, keepdim=True)
        if self.normalise:
            centred = centred / (groups.std(1, keepdim=True) + 1e-8)
        else:
            centred = centred * (groups.shape[1] / (groups.shape[1] - 1))  # the baseline leaves the path itself out
        return -(own(centred.reshape(-1)) if self.group is None else centred.reshape(-1))

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """L over a batch of rows, scaled to a sum over the steps of a path."""
        condition = conditions_of(material)
        x, k, base_mean = material["x"], material["k"], material["base_mean"]
        std, ratios = at(self.chain.std, k, x), control.ratios(self.chain)
        own = std if ratios is None else std * at(ratios, k, x)
        mean = control.mean(self.chain, k, x, base_mean=base_mean, **condition)
        moved, noise = (material["mean"] - mean) / own, (material["x_next"] - material["mean"]) / own
        ratio = log_ratio(moved, noise, 0).exp()
        advantage = material["advantage"].to(ratio)
        gain = ratio * advantage
        if self.clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        terms = self.kl * energy((mean - base_mean) / std) - gain
        return terms.mean() * len(self.chain.controlled)


def reinforce(
    chain: Chain, cost: Cost, batch: int = 64, group: int | None = None, conditions: Conditions | None = None
) -> PolicyGradient:
    """KL-regularised REINFORCE with the leave-one-out mean as baseline: unbiased with one gradient step per round."""
    return PolicyGradient(chain, cost, batch, group, conditions=conditions)


def flow_grpo(
    chain: Chain,
    cost: Cost,
    batch: int = 64,
    group: int | None = None,
    kl: float = 0.04,
    clip: float = 0.2,
    conditions: Conditions | None = None,
) -> PolicyGradient:
    """Flow-GRPO: z-scored rewards, clipped ratio, a KL penalty of each step by itself."""
    return PolicyGradient(chain, cost, batch, group, kl, False, True, clip, conditions)
