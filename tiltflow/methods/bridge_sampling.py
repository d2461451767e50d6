r"""Samplers from an arbitrary source p_0 to e^{−E}: bridge matching fixed points.

* :class:`AdjointBridgeSampling`, the Schrödinger bridge of the Brownian motion (Liu et al. 2025, arXiv:2506.22565): the
  base's end law is not Gaussian any more, so ∇log p_1^base in the target becomes a learned corrector h,

      u ← argmin E‖b + ∇E(X_1) + h(X_1)‖²,    h ← argmin E‖h(X_1) + (X_1 − X_0)/h²(1)‖²,

  with (X_0, X_1) pairs of the current control and X_t from their bridge. From the point 0, h is ∇log p_1^base.
* :class:`DampedBridgeMatching`: X_1 of the current control paired with a fresh X_0, and

      target = ii + c_t D,    ii = (X_1 − X_t)/(h²(1−ζ)),   D = −∇E(X_1) + √(ζ/(1−ζ)) ε/h

  as in :mod:`~tiltflow.methods.adjoint_sampling`; its fixed point is the Markovian projection of the mixture of bridges
  p_0 ⊗ p*. Each round moves by the share ``damping`` towards the target: (1 − η) b_old(X_t) + η target.
* :class:`BridgeMatching`: X_1 from data instead, target ii (Liu et al. 2022, arXiv:2208.14699; Peluchetti 2023,
  arXiv:2304.00917): a control and a corrector to begin with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import at
from tiltflow.core.control import Control, DriftControl
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import event_sum, sample
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.ends import require_brownian
from tiltflow.methods.step_variance import update_step_variance
from tiltflow.train.buffer import Material
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Method, Round, State


def _collect(chain: BrownianChain, cost: EnergyCost, batch: int, state: State) -> Round:
    """Rows x0, x1 (wrapped), grad, fisher and weight (0 where the energy was rejected)."""
    x0 = chain.source(batch, state.generator)
    with torch.no_grad():
        drawn = sample(chain, state.control, x0, state.generator)
    mine, grad = cost.energy_and_grad(drawn.x)
    energy = everyone(mine)
    good = torch.isfinite(energy)
    update_step_variance(state.control, chain, drawn.x, good.to(grad), state.generator, x0)
    d = chain.geometry.dimension(chain.event_shape)
    fisher = float(everyone(event_sum(grad**2))[good].mean()) / d
    material: Material = {
        "x0": x0,
        "x1": drawn.x,
        "grad": grad,
        "weight": own(good.to(grad)),
        "fisher": torch.full_like(mine, fisher),
    }
    metrics = {
        "energy": float(energy[good].median()),
        "kl": float(drawn.kl.mean()),
        "energy_calls": float(cost.energy.calls),
    }
    return Round(material, metrics, {})


def _steps(chain: BrownianChain, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(chain.std), (n,), generator=generator, device=generator.device)


@dataclass(frozen=True)
class AdjointBridgeSampling(Method):
    """One round: pairs (X_0, X_1) of the current control with ∇E(X_1); control and corrector train together.

    Args:
        chain: a Brownian chain from any source. cost: only its energy is used.
        corrector: network h(x, t) → (B, *event), evaluated at t = 1, in units of 1/h(1).
        batch: pairs per round. input_scale: divides x before the corrector.
        target: "adjoint" (the paper's), or "least_variance": ii + c_t (adjoint − ii), since adjoint − ii is
            ∇_{x_1} log p*(x_1|X_t) here as well; c_t as in :mod:`~tiltflow.methods.adjoint_sampling`, where only the small
            divergence of h differs.
        bound: on ‖∇E‖, in place of the cost's, as a function of the iteration; None: the cost's.

    Raises:
        TiltflowError: an unknown target.
    """

    chain: BrownianChain
    cost: EnergyCost
    corrector: nn.Module
    batch: int = 512
    input_scale: float = 1.0
    target: Literal["adjoint", "least_variance"] = "adjoint"
    bound: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        if self.target not in ("adjoint", "least_variance"):
            raise TiltflowError(f"target={self.target!r}: choose adjoint or least_variance.")
        require_brownian(self, self.chain)

    @property
    def auxiliary(self) -> dict[str, Any]:
        return {"corrector": self.corrector, **self.cost.auxiliary}

    def collect(self, state: State) -> Round:
        """Simulate pairs."""
        cost = self.cost if self.bound is None else replace(self.cost, max_grad_norm=self.bound(state.iteration))
        return _collect(self.chain, cost, self.batch, state)

    def corrector_terms(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """h(X_1), (B, *event), and its loss, (B,)."""
        h2, out = self.chain.end_variance, self.corrector(x1 / self.input_scale, x1.new_ones(len(x1)))
        correction = self.chain.geometry.project(out) / h2**0.5
        return correction, 0.5 * h2 * event_sum((correction + (x1 - x0) / h2) ** 2)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Adjoint matching plus corrector matching."""
        x0, x1 = material["x0"], material["x1"]
        correction, corrector_terms = self.corrector_terms(x0, x1)
        k = _steps(self.chain, len(x1), generator)
        x, _ = self.chain.bridge(k, x0, x1, generator)
        drift = -material["grad"] - correction.detach()
        if self.target == "least_variance":
            bridge, zeta = (x1 - x) / at(self.chain.remaining, k, x), at(self.chain.zeta, k, x)
            fisher = material["fisher"].reshape(-1, *(1,) * (x1.ndim - 1))
            drift = bridge + (drift - bridge) / (zeta + self.chain.end_variance * (1 - zeta) * fisher)
        terms = matching_terms(control, self.chain, x, k, -drift, x)
        return reduce_terms(terms, material["weight"]) + reduce_terms(corrector_terms, material["weight"])


@dataclass(frozen=True)
class BridgeMatching(Method):
    """Pairs (X_0, X_1) from data; trains the control and the corrector of an :class:`AdjointBridgeSampling`.

    Args:
        pretrained: whose chain, corrector and batch. data: draws pairs, (n, generator) → x0, x1 (n, *event).
    """

    pretrained: AdjointBridgeSampling
    data: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]

    @property
    def auxiliary(self) -> dict[str, Any]:
        return {"corrector": self.pretrained.corrector}

    def collect(self, state: State) -> Round:
        """Draw pairs."""
        x0, x1 = self.data(self.pretrained.batch, state.generator)
        weight = x1.new_ones(len(x1))
        update_step_variance(state.control, self.pretrained.chain, x1, weight, state.generator, x0)
        return Round({"x0": x0, "x1": x1, "weight": weight}, {}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Bridge matching plus corrector matching."""
        chain, x0, x1 = self.pretrained.chain, material["x0"], material["x1"]
        k = _steps(chain, len(x1), generator)
        x, _ = chain.bridge(k, x0, x1, generator)
        terms = matching_terms(control, chain, x, k, (x - x1) / at(chain.remaining, k, x), x)
        return reduce_terms(terms + self.pretrained.corrector_terms(x0, x1)[1])


@dataclass(frozen=True)
class DampedBridgeMatching(Method):
    """One round: end points of the current control with ∇E; the source is drawn afresh at every gradient step.

    Args:
        chain: a Brownian chain from any source. cost: only its energy is used.
        control: the control that is trained; a frozen copy of it is the b_old of the round.
        batch: end points per round. damping: η in (0, 1].
    """

    chain: BrownianChain
    cost: EnergyCost
    control: DriftControl
    batch: int = 512
    damping: float = 0.5
    previous: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        require_brownian(self, self.chain)
        if not 0 < self.damping <= 1:
            raise TiltflowError(f"damping is the share of a step taken, in (0, 1]; got {self.damping}.")
        object.__setattr__(self, "previous", copy.deepcopy(self.control.module).requires_grad_(False))

    @property
    def auxiliary(self) -> dict[str, Any]:
        return {"previous": self.previous, **self.cost.auxiliary}

    def collect(self, state: State) -> Round:
        """Simulate end points, and freeze the control that made them."""
        self.previous.load_state_dict(state.control.module.state_dict())
        return _collect(self.chain, self.cost, self.batch, state)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The damped matching loss."""
        chain, x1, h2 = self.chain, material["x1"], self.chain.end_variance
        x0 = chain.source(len(x1), generator).to(x1)
        k = _steps(chain, len(x1), generator)
        x, eps = chain.bridge(k, x0, x1, generator)
        zeta = at(chain.zeta, k, x1)
        bridge = (x1 - x0) / h2 - (zeta / (1 - zeta) / h2).sqrt() * eps
        fisher = material["fisher"].reshape(-1, *(1,) * (x1.ndim - 1))
        bracket = -material["grad"] + (zeta / (1 - zeta) / h2).sqrt() * eps
        target = bridge + bracket / (zeta + h2 * (1 - zeta) * fisher)
        with torch.no_grad():
            old = DriftControl(self.previous, self.control.finest, self.control.input_scale).drift(chain, k, x)
        target = self.damping * target + (1 - self.damping) * old
        return reduce_terms(matching_terms(control, chain, x, k, -target, x), material["weight"])
