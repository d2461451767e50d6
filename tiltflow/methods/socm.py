r"""Stochastic Optimal Control Matching: regress the control, under path weights, on a target of learned low variance.

    min_{u, N} E_{P*} Σ_k ½‖u_k + s_k a_k‖²,
    a_k = N_k(K)ᵀ∇g + Σ_{k<j<K} [ h N_k(j)ᵀ∇f(x_j) + (N_k(j+1) − J_j N_k(j))ᵀ z_j/s_j ]

with J_j the Jacobian of mean_base at x_j, z_j = (x_{j+1} − mean_base)/s_j, and any matrices N_k(j) that depend on times
only, N_k(k+1) = I. It is Stein's identity for the density of x_{k+1}, …, x_K given x_k under P*: move each x_j by N_k(j) v.
With y_j = −∇_{x_j} log P*(path) it reads E*[Σ_{j>k} N_k(j)ᵀ y_j | x_k] = 0, and y_{k+1} = z_k/s_k + c_{k+1}, hence

    E*[z_k | x_k] = −s_k E*[a_k | x_k],    a_k = c_{k+1} + Σ_{j>k+1} N_k(j)ᵀ y_j,
    c_j = h∇f(x_j) − J_jᵀ z_j/s_j  (j < K),   c_K = ∇g,   y_j = c_j + z_{j−1}/s_{j−1}.

N_k(j+1) = J_j N_k(j) is the lean adjoint; learned ones lower the variance, never the mean. The discrete form of
Domingo-Enrich, Han, Amos, Bruna, Chen 2024, arXiv:2312.02027.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.chain import Chain, at, times
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.value import WeightedPaths, weighted_paths
from tiltflow.core.weights import ess, normalised
from tiltflow.nn.mlp import MLP
from tiltflow.train.buffer import Material, condition_rows, conditions_of
from tiltflow.train.distributed import everyone, own
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Conditions, Method, Round, State


class LearnedMatrices(nn.Module):
    """N(t, s) = e^{−γ(s−t)} I + (1 − e^{−γ(s−t)}) net(t, s) for vectors of ``dim`` entries, with a learned γ > 0."""

    def __init__(self, dim: int, hidden: int = 32, layers: int = 2, gamma: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.log_gamma = nn.Parameter(torch.tensor(gamma).log())
        self.net = MLP(1, dim * dim, hidden, layers)

    def forward(self, t: Tensor) -> Tensor:
        """t_0 … t_K → N (K, K, d, d): entry [k, j] is N_k(j+1), identity at j = k, read for j ≥ k only."""
        n, like = len(t) - 1, self.net.last.weight
        early, late = (v.reshape(-1).to(like) for v in torch.meshgrid(t[1:], t[1:], indexing="ij"))
        stay = (-self.log_gamma.exp() * (late - early).clamp_min(0.0)).exp()[:, None, None]
        eye = torch.eye(self.dim, dtype=like.dtype, device=like.device)
        net = self.net(late[:, None], early).reshape(-1, self.dim, self.dim)
        return (stay * eye + (1 - stay) * net).reshape(n, n, self.dim, self.dim)


def stein_terms(chain: Chain, paths: WeightedPaths, cost: Cost, **condition: Any) -> tuple[Tensor, Tensor]:
    """c_{k+1} and y_{k+1} of the K controlled steps k, each (K, B, d); one vector–Jacobian product of the base per step.

    Noiseless last steps are pulled back into the terminal cost. Raises TiltflowError if a noiseless step
    comes before a noisy one.
    """
    steps = len(chain.controlled)
    if steps and int(chain.controlled[-1]) >= steps:
        raise TiltflowError("this chain has a noiseless step before a noisy one: paths have no density there. Add noise.")
    after = cost.grad(paths.x[-1], **condition)
    c, y = [], []
    for k in reversed(range(len(chain.std))):
        force = torch.zeros_like(after)
        if k < steps:
            force = (paths.x[k + 1] - paths.base_mean[k]) / at(chain.std, k, after) ** 2
            c.append(after)
            y.append(after + force)
        with torch.enable_grad():
            x = paths.x[k].detach().requires_grad_(True)
            pull = -force if k < steps else after
            total = (chain.base_mean(k, x, **condition) * pull).sum()
            if cost.running is not None:
                total = total + float(chain.t[k + 1] - chain.t[k]) * cost.running(x, times(chain, k, x)).sum()
            (after,) = torch.autograd.grad(total, x)
    return torch.stack(c[::-1]), torch.stack(y[::-1])


def reparametrised(c: Tensor, y: Tensor, matrices: Tensor) -> Tensor:
    """a_k = N_k(k+1)ᵀ c_{k+1} + Σ_{j>k+1} N_k(j)ᵀ y_j from rows (B, K, d) and N (K, K, d, d); (B, K, d)."""
    later = torch.ones(matrices.shape[:2], device=matrices.device).triu(1).to(matrices)[..., None, None] * matrices
    own = matrices.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    return torch.einsum("kde,bkd->bke", own, c) + torch.einsum("kjde,bjd->bke", later, y)


@dataclass(frozen=True)
class SOCM(Method):
    """One round: ``batch`` paths of the current control with their self-normalised weights. A row is one whole path.

    Args:
        chain: the base, for vectors (B, d) with d small (a matrix per pair of steps).
        cost: g and f with gradients.
        matrices: N as a module ``(t (K+1,)) -> (K, K, d, d)``, trained along; :class:`LearnedMatrices`.
        batch: paths per round; with few, the self-normalised weights bias the loss by O(1/batch).
        conditions: draws one condition row per path, ``(n, generator) -> {name: (n, …)}``.

    Raises:
        TiltflowError: matrices whose N_k(k+1) is not the identity (the target would be wrong), or of another shape.
    """

    chain: Chain
    cost: Cost
    matrices: nn.Module
    batch: int = 128
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        with torch.no_grad():
            own = self._matrices().diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        if not torch.allclose(own, torch.eye(own.shape[-1]).to(own).expand_as(own)):
            raise TiltflowError("matrices must be the identity at [k, k] (no time passed): the target is biased otherwise.")

    @property
    def auxiliary(self) -> dict[str, Any]:
        """The matrices, which the same loss trains, and what the cost keeps."""
        return {"matrices": self.matrices, **self.cost.auxiliary}

    def _matrices(self) -> Tensor:
        steps = len(self.chain.controlled)
        out = self.matrices(self.chain.t[: steps + 1])
        if out.ndim != 4 or out.shape[:2] != (steps, steps) or out.shape[2] != out.shape[3]:
            raise TiltflowError(f"matrices returned {tuple(out.shape)}; it must be ({steps}, {steps}, d, d).")
        return out

    def collect(self, state: State) -> Round:
        """Simulate and lay out rows x, base_mean, c, y (B, K, d) and the weight (B,), of mean 1."""
        generator = state.generator
        condition: dict[str, Any] = self.conditions(self.batch, generator) if self.conditions else {}
        x0 = self.chain.source(self.batch, generator)
        if x0.ndim != 2:
            raise TiltflowError(f"SOCM is for vectors (B, d), not {tuple(x0.shape)}: its matrices have d × d entries.")
        paths = weighted_paths(self.chain, state.control, self.cost, x0, generator, **condition)
        c, y = stein_terms(self.chain, paths, self.cost, **condition)
        log_w = everyone(paths.log_weight)
        material: Material = {
            "x": paths.x[: len(c)].transpose(0, 1),
            "base_mean": paths.base_mean[: len(c)].transpose(0, 1),
            "c": c.transpose(0, 1),
            "y": y.transpose(0, 1),
            "weight": own((normalised(log_w) * len(log_w)).to(x0)),
            **condition_rows(condition),
        }
        return Round(material, {**paths.metrics(self.cost), "ess": ess(log_w)}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Weighted matching loss, mean over paths and steps, in the control's weights and the matrices'."""
        a_next = reparametrised(material["c"], material["y"], self._matrices().to(material["c"]))
        paths, steps = a_next.shape[:2]
        condition = {name: v.repeat_interleave(steps, 0) for name, v in conditions_of(material).items()}
        terms = matching_terms(
            control,
            self.chain,
            material["x"].flatten(0, 1),
            torch.arange(steps, device=a_next.device).repeat(paths),
            a_next.flatten(0, 1),
            material["base_mean"].flatten(0, 1),
            **condition,
        )
        return reduce_terms(terms, material["weight"].repeat_interleave(steps))
