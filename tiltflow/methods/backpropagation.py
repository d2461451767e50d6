r"""Truncated backpropagation: the gradient of the objective, or of the reward alone, through the simulated chain itself.

    x_{k+1} = mean_u(k, x_k) + ρ_k s_k ε_k,   ε fixed:   min E[ Σ_{k ≥ K−last} (½‖u_k‖² + h f(x_k)) + g(x_K) ]

With all steps this is the discrete adjoint, and for a sampler from a point the Path Integral Sampler (Zhang, Chen 2021,
arXiv:2111.15141): an unbiased gradient of KL(P^u ‖ P*), path by path that of basic Adjoint Matching. Fewer bias it.

Without Σ(½‖u_k‖² + h f) it is DRaFT (Clark, Vicol, Swersky, Fleet 2023, arXiv:2309.17400), DRaFT-K for last = K. ReFL (Xu
et al. 2023, arXiv:2304.05977) stops at a random late step and scores the prediction X̂_1(x_k). Both ignore the base: their
optimum maximises the reward, it is not p_base e^{−g}, and only stopping early keeps them near the base.

A last step with std 0 has infinite KL if anything but the base makes it, so with ``kl`` it is the base's own, as everywhere
in the library, and ``last`` counts the steps before it. Without ``kl`` nothing forbids the fine-tuned model to make it, as
in the papers: x_K = X̂_1 of that model, and DRaFT-1 trains just this step. Draw such samples from the tuned process itself
(its own chain, or the ODE): :func:`tiltflow.core.simulate.sample` on the base's chain takes the base's last step.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tiltflow.core.chain import Chain, times
from tiltflow.core.control import Control, FineTuned
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import noise as tangent_noise
from tiltflow.core.simulate import actors, event_sum, running_cost, transition
from tiltflow.train.buffer import Material, condition_rows, conditions_of
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class Backpropagation(Method):
    """One round: the states where the gradient starts, and the noise of the steps that carry it.

    The steps before are simulated once, while collecting: with several updates per round, or a buffer of several rounds,
    they are those of the control that collected. With ``last`` None the rows start at x_0 and are never out of date.

    Args:
        chain: the base as a Gaussian chain.
        cost: g and ∇g, and f. The gradient that enters at x_K is ``cost.grad``, hence clipped if the cost clips it.
        batch: paths per round.
        last: how many of the last steps that the control makes carry gradient (None: all steps).
        kl: add ½‖u_k‖² + h f of those steps; without it only g is minimised, whatever becomes of the base.
        stop: ReFL instead: once per round draw k among the last ``stop`` steps, walk to x_k without gradient, and minimise
            g(X̂_1(x_k)) of the fine-tuned model. The round's "reward" is that of X̂_1, its "kl" that of the walk to x_k.
        checkpointing: keep only the states and evaluate each step again in the backward pass: same gradient, less memory.
        conditions: draws one condition row per path, ``(n, generator) -> {name: (n, …)}``.

    Raises:
        TiltflowError: ``last`` or ``stop`` out of range, ``stop`` together with settings it excludes; while collecting, a
            control without X̂_1 under ``stop``, or more steps asked for than the control makes.
    """

    chain: Chain
    cost: Cost
    batch: int = 64
    last: int | None = None
    kl: bool = True
    stop: int | None = None
    checkpointing: bool = False
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("stop", self.stop)):
            if value is not None and not 1 <= value <= len(self.chain.std):
                raise TiltflowError(f"{name}={value}: the chain has {len(self.chain.std)} steps; ask for 1 to all of them.")
        if self.stop is not None and (self.kl or self.last is not None or self.checkpointing):
            raise TiltflowError(
                "stop (ReFL) differentiates one prediction and nothing else: pass kl=False, without last and checkpointing."
            )

    @property
    def auxiliary(self) -> dict[str, Any]:
        return self.cost.auxiliary

    def collect(self, state: State) -> Round:
        """Simulate without gradients; the draws come in the order of :func:`tiltflow.core.simulate.walk`."""
        control, generator = state.control, state.generator
        condition: dict[str, Any] = self.conditions(self.batch, generator) if self.conditions else {}
        x = self.chain.source(self.batch, generator)
        first = self._first(control, generator)
        start, spent, noise, makers = x, [], [], actors(self.chain, control)
        with torch.no_grad(), parametrize.cached():
            for k in range(len(self.chain.std) if self.stop is None else first):
                start = x if k == first else start
                noise.append(tangent_noise(self.chain.geometry, x, generator))
                x, energy = self._step(control, makers[k], k, x, noise[k], True, condition)
                spent.append(energy.mean())
            material = condition_rows(condition)
            if self.stop is None:
                material |= {"x": start, "noise": torch.stack(noise[first:], 1)}
            else:
                material |= {"x": x, "k": torch.full((self.batch,), first, device=x.device)}
                x = self._predict(control, x, material["k"], condition)
            reward = mean_reward(self.cost, self.cost.value(x, **condition))
        kl = sum(torch.stack(spent).tolist()) if spent else 0.0
        return Round(material, {"reward": reward, "kl": kl}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The objective of the rows, differentiable through every stored step."""
        condition = conditions_of(material)
        x, makers = material["x"], actors(self.chain, control)
        if self.stop is not None:
            return self._terminal(self._predict(control, x, material["k"], condition), condition).mean()

        def step(k: int, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            x_next, cost = self._step(control, makers[k], k, x, noise, self.kl, condition)
            return x_next, cost + running_cost(self.chain, self.cost.running, k, x) if self.kl else cost

        total = torch.zeros_like(event_sum(x))
        first = len(self.chain.std) - material["noise"].shape[1]
        with nullcontext() if self.checkpointing else parametrize.cached():  # a cache would be gone when steps are repeated
            for j, noise in enumerate(material["noise"].unbind(1)):
                if self.checkpointing:
                    x, cost = checkpoint(step, first + j, x, noise, use_reentrant=False)
                else:
                    x, cost = step(first + j, x, noise)
                total = total + cost
        return (total + self._terminal(x, condition)).mean()

    def _acts(self, control: Control, k: int) -> bool:
        """Whether the control makes step k: a noiseless one only if no KL is asked for and the control is a model."""
        return k in self.chain.controlled or (not self.kl and isinstance(control, FineTuned))

    def _first(self, control: Control, generator: torch.Generator) -> int:
        """The first step that carries gradient."""
        steps = len(self.chain.std)
        if self.stop is not None:
            return steps - 1 - int(torch.randint(self.stop, (), generator=generator, device=generator.device))
        acting = [k for k in range(steps) if self._acts(control, k)]
        if len(acting) < (self.last or 1):
            raise TiltflowError(
                f"last={self.last}, but the control makes {len(acting)} of the chain's {steps} steps (where std is 0, it is "
                "the base's); ask for fewer or use a chain with noise."
            )
        return 0 if self.last is None else acting[-self.last]

    def _step(
        self, control: Control, maker: tuple[Control | None, float], k: int, x: Tensor, noise: Tensor, with_base: bool,
        condition: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x_{k+1} and KL(p_u ‖ p_base) (B,): zero without the base's mean, and for a noiseless step."""
        actor, ratio = maker
        base_mean = self.chain.base_mean(k, x, **condition) if with_base else None
        made = control if self._acts(control, k) else None
        s = transition(self.chain, made, k, x, noise, ratio, condition, with_base and actor is not None, base_mean)
        return s.x_next, torch.zeros_like(event_sum(x)) if s.u is None else s.kl(self.chain.geometry.dimension(x.shape[1:]))

    def _predict(self, control: Control, x: Tensor, k: Tensor, condition: dict[str, Any]) -> Tensor:
        """X̂_1(x_k) of the fine-tuned model."""
        if not isinstance(control, FineTuned):
            raise TiltflowError(
                f"stop (ReFL) predicts the end point from a late step, and {type(control).__name__} has no such prediction: "
                "use a FineTuned control, or draft(...)."
            )
        return control.process.x1(x, times(self.chain, k, x), **condition)

    def _terminal(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """g(x) (B,), whose gradient is ``cost.grad``."""
        end = x.detach()
        return self.cost.value(end, **condition).detach() + event_sum(self.cost.grad(end, **condition) * (x - end))


def discrete_adjoint(chain: Chain, cost: Cost, batch: int = 64, **settings: Any) -> Backpropagation:
    """The whole objective through all steps: relative entropy, the Path Integral Sampler."""
    return Backpropagation(chain, cost, batch, **settings)


def draft(chain: Chain, cost: Cost, batch: int = 64, last: int | None = 1, **settings: Any) -> Backpropagation:
    """DRaFT-``last`` (None: DRaFT, all steps): the reward alone."""
    return Backpropagation(chain, cost, batch, last, kl=False, **settings)


def refl(chain: Chain, cost: Cost, batch: int = 64, stop: int = 10, **settings: Any) -> Backpropagation:
    """ReFL's reward term, k among the last ``stop`` steps (the paper: 10 of 40), without its pretraining loss on data."""
    return Backpropagation(chain, cost, batch, kl=False, stop=stop, **settings)
