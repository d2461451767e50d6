r"""Between a sampler and an energy: count, batch, cache and check.

An energy may be dear and may fail: two atoms on top of each other overflow r⁻¹², a self-consistent field does not
converge. A row whose energy or gradient is not finite is *rejected*: its energy is +∞ (weight e^{−E} = 0), its gradient 0.
A few such rows are normal for a sampler that has only begun; a batch with more of them than good ones is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.train.distributed import total, world

MANY = 8  # from this many rows on, more than half of them rejected is an error


@runtime_checkable
class ForceProvider(Protocol):
    """An energy that comes with its forces: a molecular mechanics engine, a quantum chemistry code. It lives on the CPU."""

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E (B,), in kT, and −∇E (B, *event), in kT per unit of x, of x on the CPU. No graph is needed."""
        ...


Energy = Callable[[Tensor], Tensor] | ForceProvider


class _Known(torch.autograd.Function):
    """E(x) whose ∇E is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, energy: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return energy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return upstream.reshape(-1, *(1,) * (grad.ndim - 1)) * grad, None, None


def differentiable(provider: ForceProvider, x: Tensor) -> Tensor:
    """E(x), (B,), in the dtype of x, differentiable once in x through the provider's forces; one evaluation."""
    energy, grad = _evaluate(provider, x.detach(), True)
    assert grad is not None
    return _Known.apply(x, energy, grad)


def value_and_forces(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E (B,) and −∇E (B, *event) of any energy, without a graph; one evaluation."""
    value, grad = _evaluate(energy, x.detach(), True)
    assert grad is not None
    return value, -grad


def _shaped(out: object, shape: torch.Size, what: str) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != shape or not out.is_floating_point():
        got = f"{out.dtype}, shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise TiltflowError(
            f"{what} returned {got} for a batch of {shape[0]}; it must return floats of shape {tuple(shape)}."
        )
    return out.detach()


def _evaluate(energy: Energy, x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """E and, if wanted or free, ∇E, in the dtype and on the device of x, as the energy gives them."""
    name = f"energy {getattr(energy, '__name__', type(energy).__name__)!r}"
    if isinstance(energy, ForceProvider):
        e, forces = energy.energy_and_forces(x.cpu())
        return _shaped(e, x.shape[:1], name).to(x), -_shaped(forces, x.shape, f"forces of {name}").to(x)
    if not with_grad:
        with torch.no_grad():
            return _shaped(energy(x), x.shape[:1], name).to(x), None
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        e = energy(x)
        value = _shaped(e, x.shape[:1], name).to(x)
        grad = torch.autograd.grad(e.sum(), x, allow_unused=True)[0] if e.requires_grad else None
    if grad is None:
        raise TiltflowError(
            f"{name} is detached from its input: no gradient reaches x. Remove .detach(), .item(), .numpy() and "
            "torch.no_grad() from it, or give it a method energy_and_forces (see ForceProvider)."
        )
    return value, grad


class Evaluator:
    """Counts, batches, caches and checks an energy: a callable (B, *event) → (B,), or a ForceProvider.

    Args:
        energy: E in kT.
        batch: most rows per call of the energy (None: all at once).
        budget: most rows that may ever be evaluated (None: no limit).
        cache: number of recent rows whose results are kept, so that identical rows (to the bit) are not evaluated again.

    Attributes:
        calls: batched requests that reached the energy.
        evaluations: rows that reached it; an energy and its gradient are one evaluation.
        rejected: rows that came back non-finite, in energy or gradient.

    Raises:
        TiltflowError: at construction, for limits that are not positive; at call time, for x that is no float32 or float64
            tensor (B, *event), results of the wrong shape or dtype, an energy detached from x, a budget that the request
            would exceed (before anything is evaluated), more than half of 8 or more rows rejected.
    """

    def __init__(self, energy: Energy, *, batch: int | None = None, budget: int | None = None, cache: int = 0) -> None:
        if (batch is not None and batch < 1) or (budget is not None and budget < 0) or cache < 0:
            raise TiltflowError(
                f"batch must be at least 1, budget and cache at least 0; got batch={batch}, budget={budget}, cache={cache}."
            )
        self.energy, self.batch, self.budget = energy, batch, budget
        self.calls = self.evaluations = self.rejected = 0
        self._keep = cache
        self._cache: dict[tuple[torch.dtype, bytes], tuple[Tensor, Tensor | None]] = {}

    def value(self, x: Tensor) -> Tensor:
        """E(x), (B,), without a graph; +∞ for rejected rows."""
        return self._request(x, False)[0]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x), (B,), and ∇E(x), (B, *event), in one evaluation; +∞ and 0 for rejected rows."""
        energy, grad = self._request(x, True)
        assert grad is not None
        return energy, grad

    def __call__(self, x: Tensor) -> Tensor:
        """E(x), (B,), differentiable once in x; value and gradient are one evaluation."""
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            return _Known.apply(x, *self.value_and_grad(x))
        return self.value(x)

    def report(self) -> dict[str, int]:
        """The counters, and what is left of the budget if there is one."""
        counters = {"calls": self.calls, "evaluations": self.evaluations, "rejected": self.rejected}
        return counters if self.budget is None else {**counters, "left": self.budget - self.evaluations}

    def state_dict(self) -> dict[str, Tensor]:
        """The counters, to be saved with a run. The cache is not kept."""
        return {name: torch.tensor(getattr(self, name)) for name in ("calls", "evaluations", "rejected")}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue counting where :meth:`state_dict` stopped: of several processes the first does, for all of them.

        Raises:
            TiltflowError: a counter is missing.
        """
        if set(state) != set(self.state_dict()):
            raise TiltflowError(f"the state of an Evaluator has {sorted(self.state_dict())}, this one {sorted(state)}.")
        for name, count in state.items():
            setattr(self, name, int(count) if name == "calls" or world().rank == 0 else 0)

    def pool(self) -> None:
        """Of several processes that share the rows, let the first have the counts of all; requests are made by all alike."""
        counts = [int(n) for n in total([self.evaluations, self.rejected])]
        self.evaluations, self.rejected = counts if world().rank == 0 else (0, 0)

    def _request(self, x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
            got = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TiltflowError(f"an energy is evaluated at a float32 or float64 tensor (B, *event); got {got}.")
        x = x.detach()
        if not len(x):
            return x.new_zeros(0), x.clone() if with_grad else None
        energy, grad = self._remembered(x, with_grad) if self._keep else self._fresh(x, with_grad)
        bad = torch.isinf(energy).nonzero()[:, 0].tolist()
        if len(x) >= MANY and 2 * len(bad) > len(x):
            first = x[bad[0]]
            raise TiltflowError(
                f"the energy or its gradient is NaN or infinite for {len(bad)} of {len(x)} rows, first at row {bad[0]}, "
                f"whose coordinates reach from {float(first.min()):.4g} to {float(first.max()):.4g}. Has the sampler "
                "diverged, or does its base not cover the target? See check_energy."
            )
        return energy, grad

    def _remembered(self, x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Evaluates the rows that are not in the cache, each once."""
        keys = [(x.dtype, row.tobytes()) for row in x.cpu().numpy()]
        found = {k: self._cache[k] for k in keys if k in self._cache}
        if with_grad:
            found = {k: row for k, row in found.items() if row[1] is not None}
        missing: dict[tuple[torch.dtype, bytes], int] = {}
        for i, k in enumerate(keys):
            if k not in found:
                missing.setdefault(k, i)
        if missing:
            energy, grad = self._fresh(x[list(missing.values())], with_grad)
            found |= {k: (energy[i], None if grad is None else grad[i]) for i, k in enumerate(missing)}
        for k in keys:
            self._cache.pop(k, None)  # the most recent rows are the last ones
            self._cache[k] = found[k]
        for k in list(self._cache)[: -self._keep]:
            del self._cache[k]
        grads = [g for _, g in map(found.__getitem__, keys) if g is not None]
        return torch.stack([found[k][0] for k in keys]), torch.stack(grads) if with_grad else None

    def _fresh(self, x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Evaluates every row, and rejects."""
        if self.budget is not None and self.evaluations + len(x) > self.budget:
            raise TiltflowError(
                f"the budget of {self.budget} energy evaluations does not suffice: {self.evaluations} are used and {len(x)} "
                "more were asked for. Raise the budget, or train for fewer rounds."
            )
        parts = []
        for rows in x.split(self.batch or len(x)):
            self.calls += 1
            self.evaluations += len(rows)
            parts.append(_evaluate(self.energy, rows, with_grad))
        energy, grads = torch.cat([e for e, _ in parts]), [g for _, g in parts if g is not None]
        bad = ~torch.isfinite(energy)
        grad = torch.cat(grads) if grads else None
        if grad is not None:
            bad = bad | ~torch.isfinite(grad).flatten(1).all(1)
            grad = grad.masked_fill(bad.reshape(-1, *(1,) * (x.ndim - 1)), 0.0)
        self.rejected += int(bad.sum())
        return energy.masked_fill(bad, torch.inf), grad
