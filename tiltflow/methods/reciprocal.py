r"""Reciprocal matching: keep end points, re-noise them to any step, regress. No path, no backward sweep.

At the optimum P*(X_t | X_1) is the noising kernel, so x_t = αX_1 + βX_0 with fresh X_0 ~ N(0, I). Since
∇_{x_1} log p*(x_1 | x_t) has mean zero given x_t, so has s*(X_1) + (α/β)X_0, with s* = ∇log p* = s_base − ∇g, and

    X̂_1 target = X_1 + m_t [ s*(X_1) + (α/β) X_0 ]           (in velocities: α̇X_1 + β̇X_0 + c_t [βs*(X_1) + αX_0],
                                                               c_t = m_t W/β²,  W = βα̇ − αβ̇)

has conditional mean E*[X_1|x_t] for EVERY m_t if X_1 ~ p*. m = 0 is flow matching on own samples, which fixes any p^u.
m_t = Sβ²/(α²S + β²), on the linear path c_t = S/(St² + (1−t)²), is the closed-form adjoint of the linear drift that leads
to N(0, S I): Efficient Adjoint Matching (Shin et al. 2026, arXiv:2605.11480), and with a Föllmer base Adjoint Sampling
(Havens et al. 2025, arXiv:2504.11713). ``target="linear_adjoint"`` needs no s_base(X_1): a_{k+1} = M_{k+1}∇g(X_1), with
M = αS/(α²S + β²), is the lean adjoint with the base's Jacobian replaced by the linear drift's: exact on N(μ, S I), biased
on any other base.

Warning: p* is the fixed point, but the weights of well separated modes hardly move: a sample's score says nothing of the
mass of its mode. ``importance`` (path weights) corrects them at the price of the effective sample size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, InterpolantChain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant
from tiltflow.core.process import Process
from tiltflow.core.weights import tempered
from tiltflow.methods.ends import Projected, draw_ends, end_variance, project, require_reciprocal, snr, toward
from tiltflow.train.buffer import Material, condition_rows
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State

Gain = Callable[[Tensor], Tensor]
Score = Callable[..., Tensor]
























def linear_drift(path: Interpolant, variance: float) -> Gain:
    """m_t = Sβ²/(α²S + β²), the residual variance of N(μ, S I): Efficient Adjoint Matching's gain (there S = 1)."""
    return lambda t: variance / (1 + variance * snr(path, t))


def from_velocity(path: Interpolant, c: Gain) -> Gain:
    """m_t = c_t β²/W from the c_t of the velocity form."""
    return lambda t: c(t) * path.beta(t) ** 2 / path.wronskian(t)


def score_at_end(base: Process, t: float = 0.99) -> Score:
    """s_base(x_1) ≈ α s_t(αx_1): at exactly t = 1 only the predictor "score" says it.

    Any other is 0/0 there, and its limit (:mod:`tiltflow.core.limits`) hangs on derivatives in t that training does not fix.
    The score returned is that of the base smoothed by noise of variance (β/α)², 1e-4 at t = .99 on the linear path; float32
    errors of the model are divided by β², so do not go closer to 1 than the model is accurate.
    """

    def score(x1: Tensor, **condition: Any) -> Tensor:
        time = torch.full((len(x1),), t, dtype=x1.dtype, device=x1.device)
        alpha = base.interpolant.alpha(torch.tensor(t, dtype=torch.float64)).to(x1)
        return alpha * base.score(alpha * x1, time, **condition)

    return score


@dataclass(frozen=True)
class ReciprocalMatching(Method):
    """One round: end points of the current policy with their scores; every gradient step re-noises them afresh.

    Args:
        chain: the base as a memoryless chain.
        cost: g, differentiable (or with its own ``grad``).
        batch: end points per round.
        draws: re-noisings of each row per gradient step.
        variance: S of the linear drift; None: that of the base's end points (:func:`end_variance`).
        gain: m_t as a function of t, e.g. ``from_velocity(path, c)``, ``torch.zeros_like``; None: ``linear_drift(path, S)``.
        base_score: s_base(x1, **condition); None: the base's own just before t = 1 (:func:`score_at_end`).
        target: "score" (exact for every base), or "linear_adjoint" (no base score, biased unless the base is N(μ, S I)).
        time_weight: w(t) → weights of the steps.
        importance: weight end points by their self-normalised path weight, tempered to an ESS of one half.
        conditions: draws one condition row per path.

    Raises:
        TiltflowError: a chain that is not memoryless, a running cost, or a gain for the linear adjoint.
    """

    chain: Chain
    cost: Cost
    batch: int = 256
    draws: int = 1
    variance: float | None = None
    gain: Gain | None = None
    base_score: Score | None = None
    target: Literal["score", "linear_adjoint"] = "score"
    time_weight: Gain | None = None
    importance: bool = False
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        require_reciprocal(self.chain, self.cost)
        if self.target == "linear_adjoint" and (self.gain is not None or self.base_score is not None):
            raise TiltflowError('target="linear_adjoint" uses neither gain nor base_score; leave them out or use "score".')

    def collect(self, state: State) -> Round:
        """Simulate, and store x_1 with ∇g(x_1), s_base(x_1) if needed, and a weight."""
        chain = cast(InterpolantChain, self.chain)
        ends = draw_ends(chain, self.cost, state.control, self.batch, state.generator, self.conditions)
        x1 = ends.samples.x
        material: Material = {
            "x1": x1,
            "grad": self.cost.grad(x1, **ends.condition),
            "weight": x1.new_ones(len(x1)),
            **condition_rows(ends.condition),
        }
        if self.target == "score":
            with torch.no_grad():
                material["base_score"] = (self.base_score or score_at_end(chain.base))(x1, **ends.condition)
        if self.importance:
            log_w = everyone(ends.samples.log_ratio - ends.cost)
            material["weight"] = own((tempered(log_w) * len(log_w)).to(x1))
        return Round(material, ends.metrics, {})

    def project(self, material: Material, generator: torch.Generator) -> tuple[Material, Projected, Tensor]:
        """Rows of end points, their re-noised states, and the targets a_{k+1} there."""
        chain = cast(InterpolantChain, self.chain)
        rows, p = project(chain, material, self.draws, generator)
        path, x1 = chain.base.interpolant, rows["x1"]
        variance = end_variance(chain) if self.variance is None else self.variance
        if self.target == "linear_adjoint":
            alpha, beta = path.alpha(chain.t[1:]), path.beta(chain.t[1:])
            return rows, p, at(alpha * variance / (alpha**2 * variance + beta**2), p.k, x1) * rows["grad"]
        m = (self.gain or linear_drift(path, variance))(chain.t[:-1])
        bracket = rows["base_score"] - rows["grad"] + at(snr(path, chain.t[:-1]).sqrt(), p.k, x1) * p.x0
        return rows, p, -toward(chain, p.k, p.x, x1 + at(m, p.k, x1) * bracket, p.base_mean)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss at freshly re-noised states."""
        rows, p, a_next = self.project(material, generator)
        terms = matching_terms(control, self.chain, p.x, p.k, a_next, p.base_mean, **p.condition)
        weight = rows["weight"]
        if self.time_weight is not None:
            weight = weight * at(self.time_weight(self.chain.t[:-1]), p.k, weight)
        return reduce_terms(terms, weight)
