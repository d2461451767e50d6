r"""Preference pairs: of two samples, make the better one's end more likely than the worse one's, relative to the base.

    L = −E log σ( −β K [D(x_k | winner) − D(x_k | loser)] ),    D = ½‖m_q − mean_θ‖²/s_k² − ½‖m_q − mean_base‖²/s_k²

Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) in the chain's own weights: x_k is the end point x_1 re-noised, with
one noise and one random step k for both of a pair, and m_q = A_k x_k + B_k x_1 the mean of the posterior step. −K D is a
one-step estimate of the difference of the likelihood bounds (ELBOs) of the two models, which stands in for
log p_θ(x_1)/p_base(x_1).

With that log-ratio itself and winners drawn with probability σ(λΔr) (Bradley–Terry), DPO's optimum is p_base e^{λr/β}
whatever the pairs are drawn from. With the estimate it is biased in general. On a Gaussian base with a linear reward the
stationary point still has the right end law, but not by the optimal control: every step does an equal share of the shift,
u_k = λ∇r·Var(X_1)/(β K s_k J_{k+1}), J_{k+1} the slope of X̂_1 at t_{k+1}. With the winner by reward alone no finite strength
is the optimum: training time decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils import parametrize

from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import energy, sample
from tiltflow.methods.ends import require_memoryless
from tiltflow.methods.step_variance import require_base_variance
from tiltflow.train.buffer import Material, condition_rows, conditions_of
from tiltflow.train.loss import matching_terms
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class PreferencePairs(Method):
    """One round: ``batch`` pairs of samples; the rows are pairs, re-noised afresh at every gradient step.

    Args:
        chain: the base's memoryless chain.
        cost: g = −λ r; values only.
        batch: pairs per round.
        beta: β; p_base e^{λr/β} is what is aimed at.
        labels: the winner is drawn with probability σ(λΔr) ("bradley-terry"), or is the one with the higher reward
            ("reward"), whatever λ is.
        on_policy: sample pairs from the control instead of the base.
        conditions: draws one condition row per pair, ``(n, generator) -> {name: (n, …)}``.

    Raises:
        TiltflowError: a chain that is not memoryless, β ≤ 0, or unknown labels; while collecting, a control with its own
            step variance.
    """

    chain: Chain
    cost: Cost
    batch: int = 64
    beta: float = 1.0
    labels: Literal["bradley-terry", "reward"] = "bradley-terry"
    on_policy: bool = False
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        require_memoryless(self.chain)
        if not self.beta > 0:
            raise TiltflowError(f"beta divides the strength and must be above 0, got {self.beta}.")
        if self.labels not in ("bradley-terry", "reward"):
            raise TiltflowError(f"labels={self.labels!r} is unknown: use 'bradley-terry' or 'reward'.")

    def collect(self, state: State) -> Round:
        """Sample pairs and label them; rows are winner and loser, each (batch, *event)."""
        require_base_variance(self, self.chain, state.control)
        generator, n = state.generator, self.batch
        condition: dict[str, Any] = self.conditions(n, generator) if self.conditions else {}
        both: dict[str, Any] = {name: torch.cat([v, v]) for name, v in condition.items()}
        control = state.control if self.on_policy else None
        with parametrize.cached():
            drawn = sample(self.chain, control, self.chain.source(2 * n, generator), generator, **both)
        cost = self.cost.value(drawn.x, **both).detach()
        lead = cost[n:] - cost[:n]  # λ (r(first) − r(second))
        if self.labels == "bradley-terry":
            draw = torch.rand(n, generator=generator, dtype=cost.dtype, device=cost.device)
            first = draw < torch.sigmoid(lead)
        else:
            first = lead > 0
        first = first.reshape(-1, *(1,) * (drawn.x.ndim - 1))
        material = {
            "winner": torch.where(first, drawn.x[:n], drawn.x[n:]),
            "loser": torch.where(first, drawn.x[n:], drawn.x[:n]),
            **condition_rows(condition),
        }
        return Round(material, {"reward": mean_reward(self.cost, cost), "kl": float(drawn.kl.mean())}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The logistic loss of a batch of pairs at one random step each."""
        condition = conditions_of(material)
        winner, loser = material["winner"], material["loser"]
        chain = require_memoryless(self.chain)
        controlled = chain.controlled.to(winner.device)
        k = controlled[torch.randint(len(controlled), (len(winner),), generator=generator, device=generator.device)]
        noise = torch.randn(winner.shape, generator=generator, dtype=winner.dtype, device=winner.device)
        path = chain.base.interpolant
        rho = path.alpha(chain.t) / path.alpha(chain.t[-1])
        spread = (path.beta(chain.t) ** 2 - rho**2 * path.beta(chain.t[-1]) ** 2).clamp_min(0).sqrt()
        distances = []
        for end in (winner, loser):
            x = at(rho, k, end) * end + at(spread, k, end) * noise
            std = at(chain.std, k, x)
            with torch.no_grad():
                base_mean = chain.base_mean(k, x, **condition)
                pull = (chain.mean(k, x, end) - base_mean) / std
            terms = matching_terms(control, chain, x, k, -pull / std, base_mean, **condition)
            distances.append(terms - energy(pull))
        return -logsigmoid(-self.beta * len(controlled) * (distances[0] - distances[1])).mean()
