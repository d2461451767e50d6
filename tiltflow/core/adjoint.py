r"""Adjoints along fixed paths of a chain: a vector–Jacobian product per step, backwards, from ã_K = ∇g(x_K).

    lean   ã_k = J_{mean_base}(x_k)ᵀ ã_{k+1} + h∇f(x_k)
    full   a_k = J_{mean_u}(x_k)ᵀ a_{k+1} + ∇(½‖u_k‖²)(x_k) + h∇f(x_k)

The full adjoint is the gradient of the path's own future cost (autograd through the simulation, noise fixed). The lean one
drops every term that depends on u; at the optimum both have the same conditional mean. The target of step k → k+1 is
u_k = −s_k ã_{k+1}. Sign: ã_K = +∇g = −λ∇r. Domingo-Enrich et al. 2025, arXiv:2409.08861.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiltflow.core.chain import Chain, DriftChain, Index, InterpolantChain, at, times
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.core.simulate import Path, energy

ROWS = 2**13
"""That the base sees at once where the adjoint goes through Jacobians."""
CALL, ROW = 2**22, 2**10
"""What a call costs whatever it computes, and a row whatever the network, in weights times rows. Measured on one core with a
closed form and with networks of 9,000 and 200,000 weights, d = 1 … 8, 32 … 1024 paths."""


class Adjoint(NamedTuple):
    """a: adjoint states a_0 … a_K (K+1, B, *event); base_mean: mean_base(x_k) (K, B, *event)."""

    a: Tensor
    base_mean: Tensor


def _running_grad(chain: Chain, cost: Cost, k: Index, x: Tensor) -> Tensor:
    """h∇f(x, t_k); zeros without a state cost f."""
    if cost.running is None:
        return torch.zeros_like(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(cost.running(x, times(chain, k, x)).sum(), x)
    return at(chain.t.diff(), k, x) * grad


def lean_adjoint(
    chain: Chain,
    path: Path,
    cost: Cost,
    device: torch.device | None = None,
    micro_batch: int | None = None,
    **condition: Any,
) -> Adjoint:
    """The lean adjoint along ``path``: it needs the base only, never the control.

    One base evaluation and one product per step; for small events, where that is cheaper, whole Jacobians of many steps at
    once. The base must then treat the rows of a batch as it treats them in the loss: each by itself, at its own step.

    Args:
        device: Where to compute, if the path is kept elsewhere; the adjoint is kept where the path is.
        micro_batch: Paths whose graph is held at a time (None: all); cost and conditions must then have a row a path.
    """
    kept = Adjoint(torch.empty_like(path.x), torch.empty_like(path.mean))
    for part, own, rows in _parts(path, kept, micro_batch, condition):
        _lean(chain, part, cost, own, device, rows)
    return kept


def _parts(
    path: Path, kept: Adjoint, size: int | None, condition: dict[str, Any]
) -> Iterator[tuple[Path, Adjoint, dict[str, Any]]]:
    """``size`` of the paths at a time, their places in ``kept``, and their conditions."""
    n = path.x.shape[1]
    if size is None or size >= n:
        yield path, kept, condition
        return
    for i in range(0, n, size):
        rows = slice(i, i + size)
        part, own = Path(*(v[:, rows] for v in path)), Adjoint(*(v[:, rows] for v in kept))
        yield part, own, {name: v[rows] for name, v in condition.items()}


def _lean(
    chain: Chain, path: Path, cost: Cost, kept: Adjoint, device: torch.device | None, condition: dict[str, Any]
) -> None:
    """Fill in the lean adjoint of ``path``."""
    a = _last(path, cost, kept, device, condition)
    if a.device == path.x.device and _calls_dominate(chain, path, condition):
        for steps in reversed(torch.arange(len(path.mean)).split(max(1, ROWS // len(a)))):
            _by_jacobians(chain, path, cost, kept, steps, condition)
        return
    for k in reversed(range(len(path.mean))):
        with torch.enable_grad():
            x = path.x[k].to(a.device).detach().requires_grad_(True)
            mean = chain.base_mean(k, x, **condition)
            (a,) = torch.autograd.grad(mean, x, a)
        a = a + _running_grad(chain, cost, k, x)
        kept.a[k], kept.base_mean[k] = a, mean.detach()


def _calls_dominate(chain: Chain, path: Path, condition: dict[str, Any]) -> bool:
    """Whether d products for each of few blocks cost less than one for each step; conditions must have a row a path."""
    steps, n, d = len(path.mean), path.x.shape[1], path.x[0, 0].numel()
    saved = 1 - d * math.ceil(steps / max(1, ROWS // n)) / steps  # of the calls
    by_row = all(isinstance(rows, Tensor) and rows.ndim > 0 and len(rows) == n for rows in condition.values())
    if not isinstance(chain, InterpolantChain | DriftChain):  # a base of unknown cost, or none
        return False
    base = chain.base.model if isinstance(chain, InterpolantChain) else chain.drift
    weights = sum(p.numel() for p in base.parameters()) if isinstance(base, nn.Module) else 0
    return by_row and n * (d - 1) * (ROW + weights) < CALL * saved


def _by_jacobians(
    chain: Chain, path: Path, cost: Cost, kept: Adjoint, steps: Tensor, condition: dict[str, Tensor]
) -> None:
    """The adjoint at consecutive ``steps`` (n,), given the next: the states are known, so no evaluation waits for one."""
    many, d = slice(int(steps[0]), int(steps[-1]) + 1), path.x[0, 0].numel()
    k = steps.to(path.x.device).repeat_interleave(path.x.shape[1])
    rows = {name: v.repeat(len(steps), *(1,) * (v.ndim - 1)) for name, v in condition.items()}
    with torch.enable_grad():
        x = path.x[many].flatten(0, 1).detach().requires_grad_(True)
        mean = chain.base_mean(k, x, **rows)
        units = (e.expand(len(x), d).reshape(x.shape) for e in torch.eye(d, dtype=x.dtype, device=x.device))
        jacobian = torch.stack([torch.autograd.grad(mean, x, e, retain_graph=True)[0].flatten(1) for e in units], 1)
    kept.base_mean[many] = mean.detach().unflatten(0, (len(steps), -1))
    running = _running_grad(chain, cost, k, x).reshape(len(steps), -1, 1, d)
    a = kept.a[many.stop].reshape(-1, 1, d)
    by_step = zip(running, jacobian.unflatten(0, (len(steps), -1)), kept.a[many], strict=True)
    for own, columns, place in reversed(list(by_step)):
        a = torch.baddbmm(own, a, columns)
        place.copy_(a.view_as(place))


def full_adjoint(
    chain: Chain,
    control: Control,
    path: Path,
    cost: Cost,
    device: torch.device | None = None,
    micro_batch: int | None = None,
    **condition: Any,
) -> Adjoint:
    """The full adjoint along ``path``: the gradient of Σ_j≥k (½‖u_j‖² + h f) + g with respect to x_k.

    ``device`` and ``micro_batch`` as in :func:`lean_adjoint`.
    """
    kept = Adjoint(torch.empty_like(path.x), torch.empty_like(path.mean))
    for part, own, rows in _parts(path, kept, micro_batch, condition):
        _full(chain, control, part, cost, own, device, rows)
    return kept


def _full(
    chain: Chain,
    control: Control,
    path: Path,
    cost: Cost,
    kept: Adjoint,
    device: torch.device | None,
    condition: dict[str, Any],
) -> None:
    """Fill in the full adjoint of ``path``."""
    a, noisy = _last(path, cost, kept, device, condition), set(chain.controlled.tolist())
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


def _last(
    path: Path, cost: Cost, kept: Adjoint, device: torch.device | None, condition: dict[str, Any]
) -> Tensor:
    """The adjoint's last state, filled in."""
    a = cost.grad(path.x[-1].to(device or path.x.device), **condition)
    kept.a[-1] = a
    return a
