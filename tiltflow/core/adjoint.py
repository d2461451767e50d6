r"""Adjoints along fixed paths of a chain: one vector–Jacobian product per step, backwards, ã_K = ∇g(x_K).

    lean   ã_k = J_{mean_base}(x_k)ᵀ ã_{k+1} + h∇f(x_k)
    full   a_k = J_{mean_u}(x_k)ᵀ a_{k+1} + ∇(½‖u_k‖²)(x_k) + h∇f(x_k)

The full adjoint is the gradient of the path's own future cost (autograd through the simulation, noise fixed). The lean one
drops every term that depends on u; at the optimum both have the same conditional mean. The target of step k → k+1 is
u_k = −s_k ã_{k+1}. Sign: ã_K = +∇g = −λ∇r. Domingo-Enrich et al. 2025, arXiv:2409.08861.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, at, times
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.simulate import Path, energy


class Adjoint(NamedTuple):
    """a: adjoint states a_0 … a_K (K+1, B, *event); base_mean: mean_base(x_k) (K, B, *event)."""

    a: Tensor
    base_mean: Tensor


def _running_grad(chain: Chain, cost: Cost, k: int, x: Tensor) -> Tensor | float:
    if cost.running is None:
        return 0.0
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(cost.running(x, times(chain, k, x)).sum(), x)
    return float(chain.t[k + 1] - chain.t[k]) * grad


def lean_adjoint(
    chain: Chain, path: Path, cost: Cost, device: torch.device | None = None, **condition: Any
) -> Adjoint:
    """The lean adjoint along ``path``: it needs the base only, never the control.

    ``device``: where to compute, if the path is kept elsewhere; the adjoint is kept where the path is.
    """
    kept, a = _last(path, cost, device, condition)
    for k in reversed(range(len(path.mean))):
        with torch.enable_grad():
            x = path.x[k].to(a.device).detach().requires_grad_(True)
            mean = chain.base_mean(k, x, **condition)
            (a,) = torch.autograd.grad(mean, x, a)
        a = a + _running_grad(chain, cost, k, x)
        kept.a[k], kept.base_mean[k] = a, mean.detach()
    return kept


def full_adjoint(
    chain: Chain, control: Control, path: Path, cost: Cost, device: torch.device | None = None, **condition: Any
) -> Adjoint:
    """The full adjoint along ``path``: the gradient of Σ_j≥k (½‖u_j‖² + h f) + g with respect to x_k.

    ``device`` as in :func:`lean_adjoint`.
    """
    kept, a = _last(path, cost, device, condition)
    noisy = set(chain.controlled.tolist())
    for k in reversed(range(len(path.mean))):
        with torch.enable_grad():
            x = path.x[k].to(a.device).detach().requires_grad_(True)
            std = at(chain.std, k, x)
            base_mean = chain.base_mean(k, x, **condition)
            if k in noisy:
                mean = control.mean(chain, k, x, base_mean=base_mean, **condition)
                own = energy((mean - base_mean) / std)
                (a,) = torch.autograd.grad((mean * a).sum() + own.sum(), x)
            else:
                (a,) = torch.autograd.grad(base_mean, x, a)
        a = a + _running_grad(chain, cost, k, x)
        kept.a[k], kept.base_mean[k] = a, base_mean.detach()
    return kept


def _last(path: Path, cost: Cost, device: torch.device | None, condition: dict[str, Any]) -> tuple[Adjoint, Tensor]:
    """Room for the adjoint, its last state filled in, and that state."""
    a = cost.grad(path.x[-1].to(device or path.x.device), **condition)
    kept = Adjoint(torch.empty_like(path.x), torch.empty_like(path.mean))
    kept.a[-1] = a
    return kept, a
