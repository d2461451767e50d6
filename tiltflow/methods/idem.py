r"""iDEM: regress the score of the noised target on its Monte Carlo estimate. Akhound-Sadegh et al. 2024, arXiv:2402.06121.

With noise of variance τ² still to come, p_t = e^{−E} * N(0, τ²I) and

    ∇log p_t(x) ≈ ∇log Σ_i exp(−E(x + τε_i)) = Σ_i w_i (−∇E(x + τε_i)),    w = softmax(−E(x + τε_i)),

on x = X_1 + τε for end points X_1 of the current control. Biased for a finite number of draws; ``draws`` energies per row
and gradient step, where Adjoint Sampling spends one per row and round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import at
from tiltflow.core.control import Control
from tiltflow.core.cost import clip_rows
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import noise
from tiltflow.core.simulate import sample
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.ends import require_brownian
from tiltflow.train.buffer import Material
from tiltflow.train.loss import matching_terms
from tiltflow.train.method import Method, Round, State


@dataclass(frozen=True)
class IteratedDenoising(Method):
    """One round: end points of the reverse process; their scores are estimated at every gradient step.

    Args:
        chain: a Brownian chain from N(0, σ_max² I): the reverse of the noising. cost: only its energy is used.
        finest: σ_min, so that τ² = σ_min² + what is still to come.
        batch: end points per round. draws: energies per score. max_score: bound on a score's norm (each particle's).
    """

    chain: BrownianChain
    cost: EnergyCost
    finest: float
    batch: int = 512
    draws: int = 100
    max_score: float | None = None

    def __post_init__(self) -> None:
        require_brownian(self, self.chain)
        if self.chain.initial is None:
            raise TiltflowError("iDEM reverses the noising from N(0, σ_max² I): build its chain with that source.")

    @property
    def auxiliary(self) -> dict[str, Any]:
        return self.cost.auxiliary

    def collect(self, state: State) -> Round:
        """Simulate end points; no energy is evaluated."""
        with torch.no_grad():
            drawn = sample(self.chain, state.control, self.chain.source(self.batch, state.generator), state.generator)
        material: Material = {"x1": self.chain.geometry.wrap(drawn.x)}
        return Round(material, {"kl": float(drawn.kl.mean()), "energy_calls": float(self.cost.energy.calls)}, {})

    @torch.no_grad()
    def score(self, x: Tensor, tau: Tensor, generator: torch.Generator) -> Tensor:
        """The estimate of ∇log p_t at x (n, *event); tau (n, 1, …)."""
        y = x.repeat_interleave(self.draws, 0)
        y = y + tau.repeat_interleave(self.draws, 0) * noise(self.chain.geometry, y, generator)
        energy, grad = self.cost.energy_and_grad(y)
        weight = torch.softmax(-energy.reshape(len(x), self.draws), 1)
        score = -torch.einsum("ni,ni...->n...", weight, grad.reshape(len(x), self.draws, *x.shape[1:]))
        return score if self.max_score is None else clip_rows(score, self.max_score, each_particle=x.ndim > 2)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """½ s_k²‖b − score‖² at freshly noised end points."""
        chain, x1 = self.chain, material["x1"]
        k = torch.randint(len(chain.std), (len(x1),), generator=generator, device=generator.device)
        tau = at((chain.remaining + self.finest**2).sqrt(), k, x1)
        x = x1 + tau * noise(chain.geometry, x1, generator)
        return matching_terms(control, chain, x, k, -self.score(x, tau, generator), x).mean()
