r"""Deterministic Adjoint Matching: the lean adjoint along the fine-tuned model's probability-flow ODE.

    ẋ = v_finetuned(x, t),    ȧ = −[∇v_base]ᵀ a,  a_1 = ∇g(x_1),    regress v_finetuned − v_base = −η(t) a(t)

on the states of the ODE: the memoryless fine-tuning target v* − v_base = −η∇V with a(t) in the place of ∇V. No noise, no
rare paths, and no average over the end points that x_t may still reach: a(t) is the gradient of the reward where the ODE
ends, ∇V that of the expected e^r. Biased on every base: even for N(0, S I) and a linear reward b·x the ODE gives
a = −√(S/(α²S + β²)) b where −∇V = αS/(α²S + β²) b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.chain import Chain, euler_maruyama
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.noise import zero
from tiltflow.core.simulate import Path
from tiltflow.methods.ends import require_memoryless
from tiltflow.methods.step_variance import require_base_variance
from tiltflow.train.buffer import Material, condition_rows, conditions_of, repeat_rows
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class DeterministicAdjointMatching(Method):
    """One round: ``batch`` ODE paths of the fine-tuned model on the chain's grid, with the base's adjoint along them.

    Args:
        chain: the memoryless chain, whose steps' controls are regressed. cost: g.
        batch: paths per round.
        conditions: draws one condition row per path.

    Raises:
        TiltflowError: a chain that is not memoryless; while collecting, a control with its own step variance.
    """

    chain: Chain
    cost: Cost
    batch: int = 256
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        require_memoryless(self.chain)

    def collect(self, state: State) -> Round:
        """Rows x, k, a_next, base_mean (of the chain) for all steps that have a control."""
        require_base_variance(self, self.chain, state.control)
        flow = euler_maruyama(require_memoryless(self.chain).base, self.chain.t, zero)
        condition: dict[str, Any] = self.conditions(self.batch, state.generator) if self.conditions else {}
        x = self.chain.source(self.batch, state.generator)
        states, means = [x], []
        with torch.no_grad(), parametrize.cached():
            for k in range(len(flow.std)):
                means.append(state.control.mean(flow, k, states[-1], **condition))
                states.append(means[-1])
            base_mean = torch.stack([self.chain.base_mean(k, x, **condition) for k, x in enumerate(states[:-1])])
            reward = mean_reward(self.cost, self.cost.value(states[-1], **condition))
        path = Path(torch.stack(states), torch.stack(means))
        adjoint = lean_adjoint(flow, path, self.cost, **condition)
        steps = self.chain.controlled.to(x.device)

        def rows(v: Tensor) -> Tensor:
            return v[steps].reshape(len(steps) * self.batch, *v.shape[2:])

        material: Material = {
            "x": rows(path.x[:-1]),
            "k": steps.repeat_interleave(self.batch),
            "a_next": rows(adjoint.a[1:]),
            "base_mean": rows(base_mean),
            **repeat_rows(condition_rows(condition), len(steps)),
        }
        with torch.no_grad():
            zero_target = torch.zeros_like(material["a_next"])
            columns = (material["x"], material["k"], zero_target, material["base_mean"])
            kl = float(matching_terms(state.control, self.chain, *columns, **conditions_of(material)).sum()) / self.batch
        norms = adjoint.a.reshape(len(adjoint.a), self.batch, -1).norm(dim=2).mean(1)
        return Round(material, {"reward": reward, "kl": kl}, {"adjoint_norm": norms.tolist()})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss on the chain's controls."""
        columns = (material[name] for name in ("x", "k", "a_next", "base_mean"))
        return reduce_terms(matching_terms(control, self.chain, *columns, **conditions_of(material)))
