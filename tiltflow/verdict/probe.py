r"""The questions of :func:`tiltflow.verdict.check_reward.check_reward`, one function each: (value, status, what it means).

Gradients are held against central differences (r(x + hd) − r(x − hd))/2h along random directions d ~ N(0, I), with h and
h/2: where the two disagree, the difference is no judge, and the answer is "cannot tell".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.cost import Reward
from tiltflow.core.device import double
from tiltflow.verdict.line import Status
from tiltflow.verdict.questions import Answer, Question

PROBES, DIRECTIONS, BATCH = 32, 8, 256
TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-2}


@dataclass(frozen=True)
class Probe:
    """A reward at samples x (N, *event), under one condition: the first row of every tensor in ``condition``."""

    reward: Reward
    x: Tensor
    condition: dict[str, Any]
    generator: torch.Generator

    def raw(self, x: Tensor) -> Any:
        """Whatever the reward returns for a copy of x, rows of the condition beside it."""
        rows = {}
        for name, v in self.condition.items():
            if isinstance(v, Tensor) and v.ndim:
                v = v[:1].expand(len(x), *v.shape[1:]).contiguous()
                v = v.to(x.dtype) if v.is_floating_point() else v
            rows[name] = v
        return self.reward(x.clone(), **rows)

    @torch.no_grad()
    def value(self, x: Tensor) -> Tensor:
        """r(x), (len(x),), in batches."""
        return torch.cat([self.raw(part) for part in x.split(BATCH)])

    def gradient(self, x: Tensor) -> Tensor | None:
        """∇r(x), or None if the reward is detached from x."""
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)
            r = self.raw(x)
            return torch.autograd.grad(r.sum(), x, allow_unused=True)[0] if r.requires_grad else None

    @property
    def few(self) -> Tensor:
        """The first samples, for what is dear."""
        return self.x[:PROBES]

    @cached_property
    def values(self) -> Tensor:
        """r at every sample, float64."""
        return double(self.value(self.x))

    @cached_property
    def gradients(self) -> Tensor:
        """∇r at the first samples, flattened: (n, d), float64."""
        parts = [self.gradient(part) for part in self.x[:BATCH].split(PROBES)]
        return double(torch.cat([part for part in parts if part is not None]).flatten(1))

    @property
    def scale(self) -> float:
        """Standard deviation of r, or the rounding error of a constant."""
        return max(float(self.values.std()), 1e-6 * float(self.values.abs().max()), 1e-30)


def shape(p: Probe) -> Answer:
    """One axis."""
    r, n = p.raw(p.few), len(p.few)
    if not isinstance(r, Tensor):
        return None, "fail", f"returned {type(r).__name__}, not a tensor of shape ({n},)"
    if r.ndim != 1:
        return r.ndim, "fail", f"returned shape {tuple(r.shape)} for {n} samples; it must be ({n},), one number each"
    return 1, "pass", f"{tuple(r.shape)} for {n} samples"


def length(p: Probe) -> Answer:
    """One number per sample, for several batch sizes and for one."""
    for n in (len(p.few), len(p.few) - 1, 1):
        got = tuple(p.raw(p.few[:n]).shape)
        if got != (n,):
            return (got[0] if got else 0), "fail", f"returned shape {got} for a batch of {n}; it must be ({n},)"
    return len(p.few), "pass", "one number per sample, for batches of several sizes and of one"


def dtype(p: Probe) -> Answer:
    """Floating point, preferably of 32 bits or more."""
    r = p.raw(p.few)
    text = f"{r.dtype} for {p.x.dtype} samples".replace("torch.", "")
    if not r.is_floating_point():
        return None, "fail", text + ": whole numbers have no gradient"
    return None, "pass" if r.dtype.itemsize >= 4 else "warn", text


def finite(p: Probe) -> Answer:
    """No NaN or infinity on any sample."""
    bad = int((~torch.isfinite(p.values)).sum())
    return bad, "fail" if bad else "pass", f"{bad} of {len(p.x)} values are NaN or infinite"


def unchanged(p: Probe) -> Answer:
    """x is as it was, or was changed by operations that autograd has recorded."""
    handed: list[Tensor] = []

    def recorded(x: Tensor, **rows: Any) -> Tensor:
        handed.append(x)
        return p.reward(x, **rows)

    x = p.few.detach().requires_grad_(True)
    with torch.enable_grad():
        replace(p, reward=recorded).raw(x)
    y = handed[0]
    changed = int((y.detach() != x.detach()).flatten(1).any(1).sum())
    if not changed:
        return 0, "pass", "x is the same after the call"
    text = f"the reward changes its input in place, in {changed} of {len(x)} rows; it is given a copy"
    if type(y.grad_fn).__name__ != "CloneBackward0":
        return changed, "pass", text
    return changed, "fail", text + ", but autograd does not see the change, so the gradient is wrong: work on x.clone()"


def deterministic(p: Probe) -> Answer:
    """Two equal calls agree."""
    gap = float((p.value(p.few) - p.value(p.few)).abs().max()) / p.scale
    text = "largest difference between two equal calls, in standard deviations of r"
    if gap > 1e-3:
        text += ": is a network in training mode (dropout), or does the reward draw random numbers?"
    return gap, "pass" if gap == 0 else "warn" if gap <= 1e-3 else "fail", text


def batch_independent(p: Probe) -> Answer:
    """r(x_i) is the same alone, in another order, and in other company."""
    n, together = len(p.few) // 2, p.value(p.few)
    order = torch.randperm(len(p.few), generator=p.generator, device=p.generator.device).to(p.x.device)
    gaps = (
        p.value(p.few[:1]) - together[:1],
        p.value(p.few[order]) - together[order],
        p.value(torch.cat([p.few[:n], p.x[-n:]]))[:n] - together[:n],
    )
    worst = max(float(gap.abs().max()) for gap in gaps) / p.scale
    text = "largest change of r(x_i) when the rest of its batch changes, in standard deviations of r"
    return worst, "pass" if worst <= 1e-3 else "fail", text + (": rows are mixed" if worst > 1e-3 else "")


def extent(p: Probe) -> Answer:
    """Mean, lowest and highest."""
    text = f"mean of r on the base's samples; they reach from {float(p.values.min()):.4g} to {float(p.values.max()):.4g}"
    return float(p.values.mean()), "pass", text


def varies(p: Probe) -> Answer:
    """Not constant on the base's samples."""
    spread, size = float(p.values.std()), float(p.values.abs().max())
    if spread <= 1e-6 * size:
        return spread, "fail", "the reward is constant on the base's samples: there is nothing to tilt"
    return spread, "pass", "standard deviation of r on the base's samples"


def differentiable(p: Probe) -> Answer:
    """A gradient reaches x."""
    if p.gradient(p.few) is None:
        advice = "remove .detach(), .item(), .numpy(), torch.no_grad() and integer casts from it"
        return None, "fail", f"the reward is detached from its input: no gradient reaches x; {advice}"
    return None, "pass", "autograd reaches x"


def finite_gradient(p: Probe) -> Answer:
    """No NaN or infinity in a gradient."""
    bad = int((~torch.isfinite(p.gradients)).any(1).sum())
    hint = " (often sqrt, norm or log at 0)" if bad else ""
    return bad, "fail" if bad else "pass", f"{bad} of {len(p.gradients)} gradients are NaN or infinite{hint}"


def _differences(p: Probe, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Directional derivatives (PROBES, DIRECTIONS): autograd's, by differences of step h, and of step h/2."""
    x = p.few.to(precision)
    g, r = p.gradient(x), p.raw(x)
    if g is None or r.dtype != precision:
        raise TypeError(f"it returns {r.dtype}".replace("torch.", ""))
    h = torch.finfo(precision).eps ** (1 / 3) * max(float(double(p.x).std()), 1e-30)
    columns: list[tuple[Tensor, ...]] = []
    for _ in range(DIRECTIONS):
        d = torch.randn(x.shape, generator=p.generator, dtype=precision, device=p.generator.device).to(x.device)
        steps = (double(p.value(x + s * d) - p.value(x - s * d)) / (2 * s) for s in (h, h / 2))
        columns.append((double((g * d).flatten(1).sum(1)), *steps))
    exact, whole, half = (torch.stack(c, 1) for c in zip(*columns, strict=True))
    return exact, whole, half


def gradient_check(p: Probe) -> Answer:
    """Autograd against central differences: in float64, or else in float32 with its own tolerance."""
    why = ""
    for precision, tolerance in TOLERANCE.items():
        name = str(precision).replace("torch.", "")
        try:
            exact, whole, half = _differences(p, precision)
        except Exception as error:
            why += f"; not in {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            continue
        reliable = (whole - half).norm(dim=1) <= 0.25 * tolerance * half.norm(dim=1)
        if 2 * int(reliable.sum()) < len(reliable):
            disagree = f"{int((~reliable).sum())} of {len(reliable)}"
            why += f"; in {name}, differences of step h and h/2 disagree at {disagree} samples"
            continue
        scale = torch.maximum(exact.norm(dim=1), half.norm(dim=1)).clamp_min(1e-30)
        error_of = ((half - exact).norm(dim=1) / scale)[reliable]
        wrong = float((error_of > tolerance).double().mean())
        text = (
            f"largest relative error of the directional derivatives at {len(error_of)} samples, in {name}; above "
            f"{tolerance:g} at {wrong:.0%} of them{why}"
        )
        return float(error_of.max()), "fail" if wrong > 0.1 else "warn" if wrong else "pass", text
    return None, "cannot tell", "finite differences are no judge here" + why


def gradient_norm(p: Probe) -> Answer:
    """Not zero where the samples are."""
    norm = p.gradients.norm(dim=1)
    dead = float((norm == 0).double().mean())
    hint = ": nothing to follow there (steps, clamps, saturation)" if dead > 0.1 else ""
    status: Status = "fail" if dead == 1 else "warn" if dead > 0.1 else "pass"
    return float(norm.median()), status, f"median ‖∇r‖; exactly 0 at {dead:.0%} of the samples{hint}"


def gradient_tail(p: Probe) -> Answer:
    """No few samples that dominate the loss."""
    norm = p.gradients.norm(dim=1)
    ratio = float(norm.max() / norm.median().clamp_min(1e-300))
    hint = ": a few samples will dominate the loss; bound them (max_grad_norm)" if ratio > 10 else ""
    return ratio, "pass" if ratio <= 10 else "warn", f"largest ‖∇r‖, {float(norm.max()):.4g}, over the median{hint}"


def rate(call: Callable[[Tensor], Tensor | None], x: Tensor) -> Answer:
    """Samples per second, after one call to warm up."""
    call(x)
    calls, started = 0, time.perf_counter()
    while calls < 1 or time.perf_counter() - started < 0.1:
        out = call(x)
        math.isnan(float(out.sum())) if out is not None else None  # waits for an asynchronous device
        calls += 1
    return calls * len(x) / (time.perf_counter() - started), "pass", f"samples per second, in batches of {len(x)}"


SOUND = ("finite gradient", "input unchanged", "batch independent")
QUESTIONS: tuple[Question, ...] = (
    Question("output shape", "(B,)", (), shape),
    Question("output length", "B, for any B", ("output shape",), length),
    Question("dtype", "floating point", ("output shape",), dtype),
    Question("finite value", "0 bad", ("output length",), finite),
    Question("deterministic", "0", ("finite value",), deterministic),
    Question("batch independent", "≤ 0.001", ("deterministic",), batch_independent),
    Question("range", "", ("finite value",), extent),
    Question("varies", "> 1e-6 of its size", ("finite value",), varies),
    Question("differentiable", "", ("output length",), differentiable),
    Question("input unchanged", "0 changed behind autograd's back", ("differentiable",), unchanged),
    Question("finite gradient", "0 bad", ("differentiable", "finite value"), finite_gradient),
    Question("gradient check", "≤ 0.001 (float32: 0.05)", SOUND, gradient_check),
    Question("gradient norm", "> 0", ("finite gradient",), gradient_norm),
    Question("gradient tail", "≤ 10", ("finite gradient",), gradient_tail),
    Question("value throughput", "", ("output length",), lambda p: rate(p.value, p.few)),
    Question("gradient throughput", "", ("differentiable",), lambda p: rate(p.gradient, p.few)),
)
"""In the order in which they are asked."""
