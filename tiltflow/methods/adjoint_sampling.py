r"""Adjoint Sampling: reciprocal matching from an energy, with a replay buffer and rare simulation.

Over a Brownian base from X_0 = 0 the lean adjoint is constant along a path, so end points are enough: X_1 from the buffer,
X_t from the bridge, and the drift b = u/σ is regressed on

    adjoint   i = −∇g(X_1) = −∇E(X_1) − ∇log p_1^base(X_1)             (Havens et al. 2025, arXiv:2504.11713)
    bridge   ii = (X_1 − X_t)/(h²(1)(1−ζ_t))                            (flow matching: no information on E)

If X_1 ~ p*, D = i − ii = ∇_{x_1} log p*(x_1|X_t) has mean zero given X_t, so ii + c_t D has the mean b* for every c_t.
With ε the bridge's noise, ii = X_1/h² − √(ζ/(1−ζ)) ε/h and D = −∇E(X_1) + √(ζ/(1−ζ)) ε/h; the variance of ii + c_t D is
least at c_t = −E[ii·D]/E‖D‖², and the virial identity E*[X_1·∇E] = d leaves one number to measure:

    c_t = S/(Sζ + h²(1−ζ)),    S = d/E‖∇E(X_1)‖².

The adjoint alone does not see the weights of separated modes, the bridge alone sees nothing. Both do under path weights,
w ∝ e^{−g} dP_base/dP_u (exact here: the chain is the process), tempered to a given effective sample size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import at
from tiltflow.core.control import Control
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import event_sum, sample
from tiltflow.core.weights import evidence, tempered
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.ends import require_brownian
from tiltflow.methods.step_variance import update_step_variance
from tiltflow.train.buffer import Material, condition_rows, conditions_of
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Method, Round, State


@dataclass(frozen=True)
class AdjointSampling(Method):
    """One round: end points of the current control, their energies' gradients and path weights.

    Args:
        chain: a Brownian chain from the point 0. cost: g over it.
        batch: end points per round: one batched call of the energy.
        target: "adjoint" (c = 1, the paper), "bridge" (c = 0), or "least_variance" (c_t measured in each round).
        minimum_ess: end points are weighted by their path weights, tempered to at least this ESS fraction; None: all equal.
        temperature: T of the round's target as a function of the iteration, falling to 1; None: 1.

    Raises:
        TiltflowError: a chain that is not Brownian, or with a random source, an unknown target, an ESS outside (0, 1).
    """

    chain: BrownianChain
    cost: EnergyCost
    batch: int = 512
    target: Literal["adjoint", "bridge", "least_variance"] = "adjoint"
    minimum_ess: float | None = None
    temperature: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        require_brownian(self, self.chain)
        if self.chain.initial is not None:
            raise TiltflowError("Adjoint Sampling starts at the point 0; from a random source use AdjointBridgeSampling.")
        if self.target not in ("adjoint", "bridge", "least_variance"):
            raise TiltflowError(f"target={self.target!r}: choose adjoint, bridge or least_variance.")
        if self.minimum_ess is not None and not 0 < self.minimum_ess < 1:
            raise TiltflowError(f"minimum_ess is a fraction in (0, 1), or None; got {self.minimum_ess}.")

    @property
    def auxiliary(self) -> dict[str, Any]:
        return self.cost.auxiliary

    def collect(self, state: State, **condition: Any) -> Round:
        """Simulate ``batch`` end points; rows x1, grad (∇E/T, clipped), weight, fisher (E‖∇E/T‖²/d of the round).

        ``condition``: rows (batch, …) that the control is given, here and in the loss.
        """
        chain, temperature = self.chain, self.temperature(state.iteration) if self.temperature else 1.0
        cost = replace(self.cost, temperature=temperature)
        with torch.no_grad():
            source = chain.source(self.batch, state.generator)
            drawn = sample(chain, state.control, source, state.generator, **condition)
        energy, grad = cost.energy_and_grad(drawn.x)
        log_w = everyone(drawn.log_ratio - energy - cost.base_log_prob(drawn.x))
        energy = everyone(energy)
        good = torch.isfinite(energy)
        found = evidence(log_w[good])
        weight = good.to(grad)
        if self.minimum_ess is not None:
            weight[good] = (tempered(log_w[good], self.minimum_ess) * int(good.sum())).to(grad)
        update_step_variance(state.control, chain, drawn.x, weight, state.generator, condition=condition)
        d = chain.geometry.dimension(chain.event_shape)
        fisher = float((weight * everyone(event_sum(grad**2))).sum() / weight.sum()) / d
        weight = own(weight)
        material: Material = {
            "x1": chain.geometry.wrap(drawn.x),
            "grad": grad,
            "weight": weight,
            "fisher": torch.full_like(weight, fisher),
            **condition_rows(condition),
        }
        metrics = {
            "energy": float((energy[good] * temperature).median()),
            "temperature": temperature,
            "ess": found.ess,
            "log_z": found.log_z,
            "kl": float(drawn.kl.mean()),
            "energy_calls": float(cost.energy.calls),
        }
        return Round(material, metrics, {})

    def project(self, material: Material, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x_k, k, target drift) of every row, at a step drawn uniformly."""
        chain, x1 = self.chain, material["x1"]
        k = torch.randint(len(chain.std), (len(x1),), generator=generator, device=generator.device)
        ambient = chain.geometry.lift(x1, chain.end_variance, generator)
        x, eps = chain.bridge(k, torch.zeros_like(x1), ambient, generator)
        zeta, h2 = at(chain.zeta, k, x1), chain.end_variance
        adjoint = -material["grad"] - chain.geometry.normal_score(x1, h2)
        if self.target == "adjoint":
            return x, k, adjoint
        bridge = ambient / h2 - (zeta / (1 - zeta) / h2).sqrt() * eps
        if self.target == "bridge":
            return x, k, bridge
        fisher = material["fisher"].reshape(-1, *(1,) * (x1.ndim - 1))
        return x, k, bridge + (adjoint - bridge) / (zeta + h2 * (1 - zeta) * fisher)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss at freshly drawn bridge points."""
        x, k, drift = self.project(material, generator)
        terms = matching_terms(control, self.chain, x, k, -drift, x, **conditions_of(material))
        return reduce_terms(terms, material["weight"])
