r"""Reinforce Adjoint Matching: Adjoint Matching with a score-function estimate of the adjoint, from reward values only.

Re-noise an end point, x_k = αX_1 + βX_0, and let X̂_1^u = E[X_1|x_k] be the SAMPLING policy's. The noise of x_1 given x_k,
n_k = B_k(X_1 − X̂_1^u)/s_k², stands for that of the step (E[ε_k|x_k, X_1] = s_k n_k): for any function G of X_1 and any
baseline b that does not depend on X_1,  E[(G − b) n_k | x_k] = B_k/s_k² Cov(X_1, G | x_k), and Stein's identity gives

    lean   a_{k+1} = (v_k/v_k^u) (g(X_1) − b) n_k              v_k, v_k^u = E‖X_1 − X̂_1‖²/d of base and policy
    full   a_{k+1} = (g(X_1) + L − b) n_k − u_k/s_k            L = log dP_u/dP_base of the simulated path

Lean: Cov_u(X_1, g|x) carries the policy's Jacobian; v_k/v_k^u puts the base's in its place, as the lean adjoint asks. Its
mean is that of the lean adjoint at re-noised points under the base policy for ANY base and cost (v^u = v there), and under
any policy if base and policy are Gaussians with isotropic covariances (with per-coordinate v_k: diagonal ones). Elsewhere it
is BIASED: one number replaces a Jacobian that varies with x.
Full: for any base, the mean of the full adjoint if the path's reversal is the noising kernel. At the optimum g + L = −log Z
on every path, so the target is the control itself without noise. Exact there, with more variance on the way.
A controlled chain's reversal is the noising kernel only as K → ∞: with few steps the learned variance is too small.

Bergmeister et al. 2026, arXiv:2605.10759; the two forms here are derived as above, the factor v_k/v_k^u is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.methods.ends import draw_ends, renoise, require_reciprocal, residual_variances, toward
from tiltflow.methods.step_variance import require_base_variance
from tiltflow.train.buffer import Material, condition_rows, conditions_of
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class ReinforceAdjointMatching(Method):
    """One round: end points, their advantages, and estimated adjoints at re-noised states.

    The estimate needs the sampling policy's X̂_1, so states are re-noised when collecting, and the buffer should keep the
    last round only, or few.

    Args:
        chain: the base as a memoryless chain.
        cost: g; only its values are used.
        batch: end points per round.
        steps: steps drawn without replacement each round (None: all), each with every end point.
        adjoint: "lean" or "full".
        group: rows that share a baseline: the mean cost of the others, so conditions should come in blocks of ``group``
            equal rows (None: the whole batch).
        conditions: draws one condition row per path.

    Raises:
        TiltflowError: a chain that is not memoryless, a running cost, too many steps, or a batch that is not made of groups;
            while collecting, a control with its own step variance.
    """

    chain: Chain
    cost: Cost
    batch: int = 256
    steps: int | None = None
    adjoint: Literal["lean", "full"] = "lean"
    group: int | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        n = len(require_reciprocal(self.chain, self.cost).controlled)
        if self.steps is not None and not 1 <= self.steps <= n:
            raise TiltflowError(f"steps = {self.steps}, but the chain has {n} controlled steps; ask for 1 to {n} of them.")
        group = self.batch if self.group is None else self.group
        if group < 2 or self.batch % group:
            raise TiltflowError(f"batch {self.batch} does not split into groups of {group} ≥ 2; choose a multiple.")

    def collect(self, state: State) -> Round:
        """Simulate, centre the costs, re-noise, and estimate."""
        require_base_variance(self, self.chain, state.control)
        chain, generator = cast(InterpolantChain, self.chain), state.generator
        ends = draw_ends(chain, self.cost, state.control, self.batch, generator, self.conditions)
        values = ends.cost - ends.samples.log_ratio if self.adjoint == "full" else ends.cost
        centred = advantage(values, self.group)
        steps = chain.controlled.to(ends.samples.x.device)
        if self.steps is not None:
            order = torch.randperm(len(steps), generator=generator, device=generator.device)
            steps = steps.to(order.device)[order[: self.steps]]
        rounds = []
        for step in steps:
            k = step.expand(self.batch)
            p = renoise(chain, k, ends.samples.x, generator, **ends.condition)
            with torch.no_grad():
                mean = state.control.mean(chain, k, p.x, base_mean=p.base_mean, **ends.condition)
                a_next = score_function_adjoint(
                    chain, k, p.x, ends.samples.x, mean, p.base_mean, centred, full=self.adjoint == "full"
                )
            rounds.append(
                {"x": p.x, "k": k, "a_next": a_next, "base_mean": p.base_mean, **condition_rows(ends.condition)}
            )
        material: Material = {name: torch.cat([r[name] for r in rounds]) for name in rounds[0]}
        return Round(material, ends.metrics, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss of a batch of rows."""
        x, k, a_next, base_mean = (material[name] for name in ("x", "k", "a_next", "base_mean"))
        return reduce_terms(matching_terms(control, self.chain, x, k, a_next, base_mean, **conditions_of(material)))


def advantage(values: Tensor, group: int | None) -> Tensor:
    """Each value minus the mean of the others in its block of ``group`` rows (None: of all rows, of all processes)."""
    if group is None:
        every = everyone(values)
        return own(advantage(every, len(every)))
    blocks = values.reshape(-1, group)
    return ((blocks - blocks.mean(1, keepdim=True)) * group / (group - 1)).reshape(-1)


def score_function_adjoint(
    chain: InterpolantChain,
    k: Tensor,
    x: Tensor,
    x1: Tensor,
    mean: Tensor,
    base_mean: Tensor,
    centred: Tensor,
    full: bool = False,
) -> Tensor:
    """The estimated a_{k+1} of rows that share one step, (n, *event).

    Args:
        chain: memoryless; k: (n,) all the same step, because v^u is a mean over the rows.
        x, x1: re-noised states and their end points.
        mean, base_mean: the step's mean under the policy that sampled x1, and under the base.
        centred: (n,) cost minus a baseline; for ``full`` the cost plus L.
        full: estimate the full adjoint instead of the lean one.
    """
    noise = toward(chain, k, x, x1, mean)
    estimate = centred.reshape(-1, *(1,) * (x.ndim - 1)).to(x) * noise
    std = at(chain.std, k, x)
    if full:
        return estimate - (mean - base_mean) / std**2
    spread = everyone((noise * std**2 / at(chain.b, k, x)).square()).mean(0)
    v = residual_variances(chain)
    spread = spread.mean() if v.ndim == 1 else spread
    return estimate * at(v, k, x) / spread
