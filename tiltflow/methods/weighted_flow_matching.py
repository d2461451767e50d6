r"""Weighted flow matching: regress on end points, re-noised as in pre-training, with weights made of reward values.

    min_u  Σ_i w_i ‖mean_u(k, x_k) − (A_k x_k + B_k x_1^i)‖²/2s_k²  +  κ ½‖u_k‖²,      x_k = αx_1^i + βX_0,

whose minimiser at κ = 0 is X̂_1 = E_w[X_1|x_k]: the end law becomes that of the weighted samples. No gradient of the reward.

    preset                   x_1 from   log w                        end law
    reward_weighted          base       −g                           p*, exactly; few samples count if g varies much
    path_weighted            policy     −g + log dP_base/dP_u        p* of the chain, exactly; equal weights at the optimum
    online_reward_weighted   policy     −g                           BIASED: p_base e^{−ng} after n rounds, → argmax r
    advantage_weighted       policy     (baseline − g)/T, with κ     BIASED: see below

Reward-weighted regression (Peters & Schaal 2007), online for flows (Fan et al. 2025, arXiv:2502.06061); advantage weights
(Peng et al. 2019, arXiv:1910.00177). A baseline cancels in self-normalised weights. With κ a fixed point balances the tilt
of a round with the pull to the base, near t = 1 ∇log p^u = s_base − ∇g/(Tκ). That is p* if Tκ = 1, the base is Gaussian and
the reward linear; elsewhere the average of two noised scores is not the noised score of one end law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess, tempered
from tiltflow.methods.ends import draw_ends, project, require_reciprocal, toward
from tiltflow.train.buffer import Material, condition_rows
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class WeightedFlowMatching(Method):
    """One round: end points and weights. See the presets of this module for the published settings.

    Args:
        chain: the base as a memoryless chain.
        cost: g; only its values are used.
        batch: end points per round.
        draws: re-noisings of each row per gradient step.
        source: whose end points, "base" or "policy".
        path_ratio: multiply the policy's weights by dP_base/dP_u: without it they ask for p_u e^{−g/T}, not p*.
        temperature: T > 0; g/T goes into the weights.
        kl: κ ≥ 0, pull of the control to zero.
        minimum_ess: temper the weights to at least this effective sample fraction (0: never, so no bias).
        conditions: draws one condition row per path.

    Raises:
        TiltflowError: a chain that is not memoryless, a running cost, path_ratio for base samples, T ≤ 0 or κ < 0.
    """

    chain: Chain
    cost: Cost
    batch: int = 256
    draws: int = 1
    source: Literal["base", "policy"] = "policy"
    path_ratio: bool = False
    temperature: float = 1.0
    kl: float = 0.0
    minimum_ess: float = 0.0
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        require_reciprocal(self.chain, self.cost)
        if self.source == "base" and self.path_ratio:
            raise TiltflowError('dP_base/dP_u is 1 on base samples: drop path_ratio, or take source="policy".')
        if not (self.temperature > 0 and self.kl >= 0):
            raise TiltflowError(f"temperature must be positive and kl at least 0; got {self.temperature} and {self.kl}.")

    def collect(self, state: State) -> Round:
        """Simulate and weigh. The reward and KL of a base round are the base's."""
        control = state.control if self.source == "policy" else None
        ends = draw_ends(self.chain, self.cost, control, self.batch, state.generator, self.conditions)
        log_w = -ends.cost / self.temperature
        if self.path_ratio:
            log_w = log_w + ends.samples.log_ratio
        log_w = everyone(log_w)
        weight = own((tempered(log_w, self.minimum_ess) * len(log_w)).to(log_w))
        material: Material = {"x1": ends.samples.x, "weight": weight, **condition_rows(ends.condition)}
        return Round(material, {**ends.metrics, "ess": ess(log_w)}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Weighted flow matching at freshly re-noised states, plus κ times the control's energy."""
        chain = cast(InterpolantChain, self.chain)
        rows, p = project(chain, material, self.draws, generator)
        a_next = -toward(chain, p.k, p.x, rows["x1"], p.base_mean)
        terms = matching_terms(control, chain, p.x, p.k, a_next, p.base_mean, **p.condition)
        if self.kl == 0:
            return reduce_terms(terms, rows["weight"])
        energy = matching_terms(control, chain, p.x, p.k, torch.zeros_like(a_next), p.base_mean, **p.condition)
        return reduce_terms(terms, rows["weight"]) + self.kl * reduce_terms(energy, rows["weight"])


def reward_weighted(chain: Chain, cost: Cost, **settings: Any) -> WeightedFlowMatching:
    """Base samples with e^{−g}: exact as the batch grows."""
    return WeightedFlowMatching(chain, cost, source="base", **settings)


def path_weighted(chain: Chain, cost: Cost, minimum_ess: float = 0.5, **settings: Any) -> WeightedFlowMatching:
    """The policy's own samples with their path weights: exact, and stays where it is at the optimum."""
    return WeightedFlowMatching(chain, cost, path_ratio=True, minimum_ess=minimum_ess, **settings)


def online_reward_weighted(chain: Chain, cost: Cost, **settings: Any) -> WeightedFlowMatching:
    """The policy's own samples with e^{−g}, uncorrected: tilts anew each round and collapses onto argmax r."""
    return WeightedFlowMatching(chain, cost, **settings)


def advantage_weighted(
    chain: Chain, cost: Cost, temperature: float = 1.0, kl: float | None = None, **settings: Any
) -> WeightedFlowMatching:
    """exp(advantage/T) on the policy's samples; κ = 1/T by default, which balances the tilt of every round."""
    kl = 1 / temperature if kl is None else kl
    return WeightedFlowMatching(chain, cost, temperature=temperature, kl=kl, **settings)
