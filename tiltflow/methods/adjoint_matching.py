r"""Adjoint Matching: regress the control on the lean adjoint along its own paths.

    min_u E ∫ ½‖u(X_t, t) + σ(t) ã(t; X)‖² dt,   X ~ p^ū,  ū = stopgrad(u)

Domingo-Enrich, Drozdzal, Karrer, Chen 2025, arXiv:2409.08861. On a memoryless chain the only critical point (in continuous
time) is the control whose end law is p_base · e^{−g}. ``adjoint="full"`` gives basic Adjoint Matching, whose gradient is
that of the discrete adjoint path by path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.core.adjoint import full_adjoint, lean_adjoint
from tiltflow.core.chain import Chain, InterpolantChain, at
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost, mean_reward
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import Path, event_sum, retrace, running_cost, simulate
from tiltflow.core.weights import ess, normalised, tempered
from tiltflow.methods.ends import renoise, require_memoryless, toward
from tiltflow.train.buffer import Material, condition_rows, conditions_of, repeat_rows
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import QuantileMask, matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State


@dataclass(frozen=True)
class AdjointMatching(Method):
    """One round: ``batch`` paths, their adjoints, and the steps to regress on.

    Args:
        chain: the base as a Gaussian chain; memoryless for fine-tuning.
        cost: g, e.g. ``RewardCost(reward, strength)``.
        batch: paths per round.
        last_steps, random_steps: regress on the last ``last_steps`` controlled steps and ``random_steps`` others drawn
            without replacement each round (None: on all). The paper: 10 and 10 of 40.
        clip: per-term bound on the loss; the paper: 1.6 λ².
        mask: a :class:`QuantileMask`; its moving average is checkpointed.
        time_weight: w(t) → weights of the steps.
        importance: weight each path by its self-normalised path weight, tempered to an ESS of one half: the regression
            then aims at the chain's p* itself, not at the current policy's idea of it.
        endpoint_share: c_k in [0, 1] per step, (K,): the share of rows that regress on the path's end point, re-noised to
            step k, instead of on its adjoint (see :func:`endpoint_share`). Needs ``importance`` and a memoryless chain.
        adjoint: "lean" (Adjoint Matching) or "full" (basic Adjoint Matching).
        conditions: draws one condition row per path, ``(n, generator) -> {name: (n, …)}``.
        rollout: the control that the paths follow (None: the trained one), sharing its weights; e.g. with guidance.
        reference: the base that the KL is told against (None: ``chain``), where the rollout differs from the chain by more
            than what is trained.
        keep: the device that paths, and the rows made of them, are kept on (None: where they are drawn).
        micro_batch: paths whose graph the adjoint holds at a time (None: all).

    Raises:
        TiltflowError: more steps asked for than the chain has, or options that exclude each other.
    """

    chain: Chain
    cost: Cost
    batch: int = 64
    last_steps: int | None = None
    random_steps: int = 0
    clip: float | None = None
    mask: QuantileMask | None = None
    time_weight: Callable[[Tensor], Tensor] | None = None
    importance: bool = False
    endpoint_share: Tensor | None = None
    adjoint: Literal["lean", "full"] = "lean"
    conditions: Conditions | None = None
    rollout: Control | None = None
    reference: Chain | None = None
    keep: torch.device | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        n = len(self.chain.controlled)
        if self.endpoint_share is not None and not self.importance:
            raise TiltflowError("endpoint_share is right under path weights only: pass importance=True too.")
        if self.endpoint_share is not None:
            require_memoryless(self.chain)
        if self.endpoint_share is not None and self.keep is not None:
            raise TiltflowError("endpoint_share computes where paths are kept: leave keep out.")
        if self.last_steps is not None and self.last_steps + self.random_steps > n:
            raise TiltflowError(
                f"last_steps + random_steps = {self.last_steps + self.random_steps}, but the chain has {n} controlled "
                "steps; ask for fewer or use more simulation steps."
            )

    @property
    def auxiliary(self) -> dict[str, Any]:
        """The mask's moving average, and what the cost keeps."""
        return self.cost.auxiliary | ({} if self.mask is None else {"mask": self.mask})

    def _steps(self, generator: torch.Generator) -> list[int]:
        steps = self.chain.controlled.tolist()
        if self.last_steps is None:
            return steps
        split = len(steps) - self.last_steps
        drawn = torch.randperm(split, generator=generator, device=generator.device)[: self.random_steps].tolist()
        return sorted(steps[i] for i in drawn) + steps[split:]

    def collect(self, state: State) -> Round:
        """Simulate, run the adjoint, and lay out the chosen (x_k, k, ã_{k+1}) as rows."""
        generator = state.generator
        condition: dict[str, Any] = self.conditions(self.batch, generator) if self.conditions else {}
        x0, policy = self.chain.source(self.batch, generator), self.rollout or state.control
        with parametrize.cached():  # low-rank updates are added to their weights once, not at every step
            path = simulate(self.chain, policy, x0, generator, self.keep, **condition)
        if self.adjoint == "lean":
            adjoint = lean_adjoint(self.chain, path, self.cost, x0.device, self.micro_batch, **condition)
        else:
            adjoint = full_adjoint(self.chain, state.control, path, self.cost, x0.device, self.micro_batch, **condition)
        steps = torch.tensor(self._steps(generator), device=path.x.device)
        n = len(steps) * self.batch
        log_ratio, kl = retrace(self.chain, policy, path, adjoint.base_mean)
        if self.reference is not None:
            kl = self._kl(self.reference, policy, path, x0.device, condition)
        cost = self.cost.value(path.x[-1].to(x0.device), **condition).detach().to(path.x.device)
        log_w = log_ratio - cost
        if self.cost.running is not None:
            for k, x in enumerate(path.x[:-1]):
                log_w = log_w - running_cost(self.chain, self.cost.running, k, x)
        log_w, cost = everyone(log_w), everyone(cost)
        weight = own((tempered(log_w) * len(log_w)).to(path.x)) if self.importance else torch.ones_like(kl)
        rows = weight.repeat(len(steps))
        if self.time_weight is not None:
            rows = rows * self.time_weight(self.chain.t[steps.cpu()]).to(rows).repeat_interleave(self.batch)

        def pick(v: Tensor) -> Tensor:
            return v[steps].reshape(n, *v.shape[2:])

        material: Material = {
            "x": pick(path.x[:-1]),
            "k": steps.repeat_interleave(self.batch),
            "a_next": pick(adjoint.a[1:]),
            "base_mean": pick(adjoint.base_mean),
            "weight": rows,
            **repeat_rows(condition_rows(condition), len(steps)),
        }
        if self.endpoint_share is not None:
            self._renoise(material, path.x[-1].repeat(len(steps), *(1,) * (path.x[-1].ndim - 1)), generator)
        norms = adjoint.a.reshape(len(adjoint.a), self.batch, -1).norm(dim=2).mean(1)
        weighted = float(-normalised(log_w) @ double(cost)) / (self.cost.strength or 1.0)
        metrics = {"reward": mean_reward(self.cost, cost), "reward_weighted": weighted, "kl": float(kl.mean())}
        metrics |= {"elbo": float(double(log_w).mean()), "path_ess": ess(log_w)}
        return Round(material, metrics, {"adjoint_norm": norms.tolist()})

    @torch.no_grad()
    def _kl(
        self, base: Chain, policy: Control, path: Path, device: torch.device, condition: dict[str, Any]
    ) -> Tensor:
        """Σ_k KL of the paths' steps to those of another base, (batch,)."""
        means = [base.base_mean(k, x.to(device), **condition).to(x.device) for k, x in enumerate(path.x[:-1])]
        return retrace(base, policy, path, torch.stack(means))[1]

    def _renoise(self, material: Material, ends: Tensor, generator: torch.Generator) -> None:
        """Make a random share c_k of the rows into end-point rows: x_k ~ q(· | x_K) anew, and the end point as target."""
        chain, k = require_memoryless(self.chain), material["k"]
        assert self.endpoint_share is not None
        draw = torch.rand(len(k), generator=generator, device=generator.device).cpu()
        picked = torch.nonzero(draw < self.endpoint_share[k.cpu()])[:, 0].to(k.device)
        condition = {name: v[picked] for name, v in conditions_of(material).items()}
        anew = renoise(chain, k[picked], ends[picked], generator, **condition)
        material["x"][picked] = anew.x
        material["base_mean"][picked] = anew.base_mean
        material["a_next"][picked] = -toward(chain, anew.k, anew.x, ends[picked], anew.base_mean)

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss of a batch of rows."""
        x, a_next, base_mean, weight = (material[n].to(generator.device) for n in ("x", "a_next", "base_mean", "weight"))
        k = material["k"].to(generator.device)
        terms = matching_terms(control, self.chain, x, k, a_next, base_mean, **conditions_of(material))
        return reduce_terms(terms, weight, self.clip, self.mask)


def endpoint_share(chain: InterpolantChain, cost: Cost, paths: int, generator: torch.Generator, **condition: Any) -> Tensor:
    """c_k from base paths, (K,): the share of end-point rows that the tails of the adjoint call for.

    Where modes separate, the adjoint's mean hangs on rare paths near the separatrix; the end point is bounded by the data.
    With M(z) = (E‖z‖⁴)^½ of each target's noise on base paths, c_k = M(adjoint)/(M(adjoint) + M(end point)).
    """
    x0 = chain.source(paths, generator)
    path = simulate(chain, None, x0, generator, **condition)
    adjoint = lean_adjoint(chain, path, cost, **condition)
    shares = []
    noisy = set(chain.controlled.tolist())
    for k, a in enumerate(adjoint.a[1:]):
        if k not in noisy:
            shares.append(0.0)
            continue
        std = at(chain.std, k, a)
        end = std * toward(chain, k, path.x[k], path.x[-1], path.mean[k])
        spread, other = (float((double(event_sum(z**2)) ** 2).mean().sqrt()) for z in (std * a, end))
        shares.append(spread / (spread + other))
    return torch.tensor(shares, dtype=torch.float64)
