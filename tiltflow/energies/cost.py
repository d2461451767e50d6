r"""The cost of sampling from an energy: g = E/T + log p_1^base, so that p* ∝ p_1^base e^{−g} = e^{−E/T}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tiltflow.core.brownian import NoiseChain
from tiltflow.core.cost import clip_rows
from tiltflow.core.errors import TiltflowError
from tiltflow.energies.evaluator import Evaluator


@dataclass(frozen=True)
class EnergyCost:
    r"""g = E/T + log p_1^base, so that p* ∝ p_base e^{−g} = e^{−E/T}; of its gradient, that of E is clipped.

    Args:
        energy: an :class:`~tiltflow.energies.evaluator.Evaluator`, in kT at T = 1.
        chain: whose end law p_1^base is; it starts at the point 0.
        max_grad_norm: bound on ‖∇E/T‖ of each particle (of each sample, for vectors).
        temperature: T.
    """

    energy: Evaluator
    chain: NoiseChain
    max_grad_norm: float | None = None
    temperature: float = 1.0
    running: ClassVar[None] = None
    strength: ClassVar[float] = 1.0

    @property
    def auxiliary(self) -> dict[str, Any]:
        """What a checkpoint keeps: the evaluator's counters."""
        return {"energy": self.energy}

    def value(self, x: Tensor, **condition: Any) -> Tensor:
        """g(x), (B,), differentiable; +inf where the energy was rejected."""
        return self.energy(self.chain.geometry.wrap(x)) / self.temperature + self.base_log_prob(x)

    def grad(self, x: Tensor, **condition: Any) -> Tensor:
        """∇g(x), with ∇E clipped."""
        return self.energy_and_grad(x)[1] + self.base_score(x)

    def base_log_prob(self, x: Tensor) -> Tensor:
        """log p_1^base(x), (B,)."""
        self._require_point()
        return self.chain.geometry.log_normal(self.chain.geometry.wrap(x), self.chain.end_variance)

    def base_score(self, x: Tensor) -> Tensor:
        """∇log p_1^base(x)."""
        self._require_point()
        return self.chain.geometry.normal_score(self.chain.geometry.wrap(x), self.chain.end_variance)

    def energy_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E/T (B,) and its clipped tangent gradient, from one evaluation of the energy; +inf and 0 where it was rejected."""
        energy, grad = self.energy.value_and_grad(self.chain.geometry.wrap(x))
        grad = self.chain.geometry.project(grad / self.temperature)
        if self.max_grad_norm is not None:
            grad = clip_rows(grad, self.max_grad_norm, each_particle=grad.ndim > 2)
        return energy / self.temperature, grad

    def _require_point(self) -> None:
        if self.chain.initial is not None:
            raise TiltflowError("the end law of a Brownian motion from a random source is not known; use a bridge method.")
