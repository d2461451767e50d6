r"""Questions of :func:`tiltflow.verdict.check_base.check_base` about one call of the network, and what all of them share.

Samples of the base are held with the noise they are mixed with: end points X_1 of the base's own ODE, X_0 ~ N(0, I), and
x_t = α_t X_1 + β_t X_0, at which a right base has E[X_1 | x_t] = X̂_1(x_t, t).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.device import double
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.train.method import Conditions
from tiltflow.verdict.questions import Answer

FEW, BATCH = 17, 500
"""Rows of a single call (a number that is no dimension of an image or a class count), and of a long computation."""
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
SAME = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class BaseProbe:
    """A base with what it is tried on: ``samples`` rows, ``steps`` of its ODE, ``conditions`` drawn row by row."""

    base: Process
    generator: torch.Generator
    samples: int
    steps: int
    conditions: Conditions | None

    @cached_property
    def x0(self) -> Tensor:
        """Source samples, (N, *event), in the default dtype, on the generator's device."""
        return self.base.source(self.samples, self.generator, torch.get_default_dtype(), self.generator.device)

    @cached_property
    def rows(self) -> dict[str, Any]:
        """A condition for every sample."""
        return dict(self.conditions(self.samples, self.generator)) if self.conditions else {}

    def few_rows(self, n: int = FEW) -> dict[str, Any]:
        """The conditions of the first n samples."""
        return {name: v[:n] for name, v in self.rows.items()}

    @property
    def few(self) -> Tensor:
        """The first source samples."""
        return self.x0[:FEW]

    def call(self, x: Tensor, t: Tensor) -> Any:
        """Whatever the network returns for copies of x and t, under the first len(x) conditions."""
        return self.base.model(x.clone(), t.clone(), **self.few_rows(len(x)))

    @cached_property
    def mixed_times(self) -> Tensor:
        """A time of its own for each of the first samples, inside (0, 1)."""
        return torch.linspace(0.1, 0.9, FEW).to(self.x0)

    @torch.no_grad()
    def x1(self, x: Tensor, t: float | Tensor, base: Process | None = None) -> Tensor:
        """X̂_1 at the first len(x) conditions, in batches."""
        time = t if isinstance(t, Tensor) else x.new_full((len(x),), t)
        parts = []
        for i in range(0, len(x), BATCH):
            rows = {name: v[: len(x)][i : i + BATCH] for name, v in self.rows.items()}
            parts.append((base or self.base).x1(x[i : i + BATCH], time[i : i + BATCH], **rows))
        return torch.cat(parts)

    def ends_of(self, base: Process) -> Tensor:
        """End points of the ODE of a base, from the samples of the source."""
        parts = []
        for i in range(0, self.samples, BATCH):
            rows = {name: v[i : i + BATCH] for name, v in self.rows.items()}
            parts.append(ode(base, self.x0[i : i + BATCH], self.steps, "heun", **rows))
        return torch.cat(parts)

    @cached_property
    def ends(self) -> Tensor:
        """End points of the base's own ODE, (N, *event)."""
        return self.ends_of(self.base)

    @property
    def spread(self) -> float:
        """Standard deviation of an entry of the end points about its own mean, or of their size if they do not vary."""
        x = double(self.ends.flatten(1))
        return max(float(x.var(0).mean().sqrt()), 1e-6 * float(x.abs().max()), 1e-30)

    def noised(self, t: float) -> Tensor:
        """x_t = α_t X_1 + β_t X_0 with fresh noise."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha, beta = float(self.base.interpolant.alpha(time)), float(self.base.interpolant.beta(time))
        noise = torch.randn(self.ends.shape, generator=self.generator, dtype=self.ends.dtype, device=self.generator.device)
        return alpha * self.ends + beta * noise.to(self.ends)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tried(p: BaseProbe, dtype: torch.dtype) -> str:
    """Whether the network takes samples of another dtype, in words."""
    try:
        out = p.call(p.few.to(dtype), p.mixed_times.to(dtype))
    except Exception as error:
        return f"{_name(dtype)} samples: {type(error).__name__}"
    return f"{_name(dtype)} samples: {_name(out.dtype)}"


@torch.no_grad()
def dtype(p: BaseProbe) -> Answer:
    """The network computes in the dtype of its samples, on their device."""
    mine, weights = p.x0.dtype, set()
    if isinstance(p.base.model, nn.Module):
        weights = {w.dtype for w in p.base.model.parameters() if w.is_floating_point()}
    described = "its weights are " + ", ".join(sorted(map(_name, weights))) + "; " if weights else ""
    try:
        out = p.call(p.few, p.mixed_times)
    except Exception as error:
        if weights and weights != {mine}:
            advice = f"convert it with model.to(torch.{_name(mine)}), or torch.set_default_dtype"
            return None, "fail", f"{described}samples are {_name(mine)}, and it raised {type(error).__name__}: {advice}"
        return None, "cannot tell", described + "see 'output shape'"
    if not isinstance(out, Tensor):
        return None, "cannot tell", described + "see 'output shape'"
    if out.device != p.few.device:
        return None, "fail", f"returned on {out.device} for samples on {p.few.device}: move it with model.to(...)"
    others = [d for d in (torch.float32, torch.float64, torch.bfloat16) if d != mine]
    text = f"{described}{_name(out.dtype)} for {_name(mine)} samples; " + "; ".join(_tried(p, d) for d in others)
    if not out.is_floating_point():
        return None, "fail", text
    if out.dtype == mine and weights <= {mine}:
        return None, "pass", text
    digits = torch.finfo(min(weights | {out.dtype}, key=lambda d: d.itemsize)).eps
    return digits, "warn", text + f": good to a relative {digits:.1g} only" if digits > torch.finfo(mine).eps else text


@torch.no_grad()
def shape(p: BaseProbe) -> Answer:
    """The shape of x, for t of shape (B,), for a batch of one too."""
    for n in (FEW, 1):
        x, t = p.few[:n], p.mixed_times[:n]
        try:
            out = p.call(x, t)
        except Exception as error:
            return None, "fail", f"it raised {type(error).__name__}: {str(error)[:200]}{_other_times(p)}"
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            return None, "fail", f"returned {got} for x of shape {tuple(x.shape)} and t of shape ({n},){_other_times(p)}"
    return None, "pass", f"{tuple(p.few.shape)} for x of that shape and t of shape ({FEW},)"


def _other_times(p: BaseProbe) -> str:
    """What else t might have to be, if that works."""
    for t, words in ((p.mixed_times[:, None], "t of shape (B, 1)"), (p.mixed_times[0], "a scalar t")):
        try:
            out = p.call(p.few, t)
        except Exception:
            continue
        if isinstance(out, Tensor) and out.shape == p.few.shape:
            return f"; it takes {words}: wrap it in a function of (x, t) that passes that on"
    return ""


@torch.no_grad()
def unchanged(p: BaseProbe) -> Answer:
    """x and t are as they were."""
    x, t = p.few.clone(), p.mixed_times.clone()
    p.base.model(x, t, **p.few_rows())
    names = [name for name, now, was in (("x", x, p.few), ("t", t, p.mixed_times)) if not torch.equal(now, was)]
    if names:
        return len(names), "fail", f"the network changes {' and '.join(names)} in place: let it work on a clone"
    return 0, "pass", "x and t are the same after the call"


RANDOM = (nn.modules.dropout._DropoutNd,)
NORMS = (nn.modules.batchnorm._NormBase,)


@torch.no_grad()
def evaluation_mode(p: BaseProbe) -> Answer:
    """Nothing in the network draws random numbers or keeps running statistics."""
    model = p.base.model
    if not isinstance(model, nn.Module):
        return None, "pass", "a function without modules"
    dropping = [n for n, m in model.named_modules() if m.training and isinstance(m, RANDOM) and m.p > 0]
    counting = [n for n, m in model.named_modules() if m.training and isinstance(m, NORMS) and m.running_mean is not None]
    before = {name: b.clone() for name, b in model.named_buffers()}
    with suppress(Exception):  # the next question's to name
        p.call(p.few, p.mixed_times)
    moved = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    found = [f"{n} ({kinds[n]}) drops at random" for n in dropping]
    found += [f"{n} ({kinds[n]}) normalises by its batch" for n in counting]
    found += [f"{n} changes with every call" for n in moved]
    if not found:
        return 0, "pass", "no dropout, batch statistics or moving buffers"
    more = "" if len(found) <= 4 else f" and {len(found) - 4} more"
    return len(found), "fail", ", ".join(found[:4]) + more + ": call model.eval()"


def _gap(a: Tensor, b: Tensor) -> float:
    a, b = double(a), double(b)
    return float((a - b).abs().max() / a.square().mean().sqrt().clamp_min(1e-30))


def _same(p: BaseProbe) -> float:
    out = p.call(p.few[:1], p.mixed_times[:1]).dtype
    return SAME.get(out, 5e-2)


@torch.no_grad()
def deterministic(p: BaseProbe) -> Answer:
    """Two equal calls agree."""
    gap = _gap(p.call(p.few, p.mixed_times), p.call(p.few, p.mixed_times))
    text = "largest difference between two equal calls, relative to the output"
    if gap > _same(p):
        return gap, "fail", text + ": is a module in training mode (dropout), or does it draw random numbers?"
    return gap, "pass", text


@torch.no_grad()
def batch_independent(p: BaseProbe) -> Answer:
    """A row's output, at its own t, is the same alone and in company."""
    together = p.call(p.few, p.mixed_times)
    alone = torch.cat(
        [
            p.base.model(p.few[i : i + 1], p.mixed_times[i : i + 1], **{n: v[i : i + 1] for n, v in p.rows.items()})
            for i in (0, FEW // 2, FEW - 1)
        ]
    )
    gap = _gap(together[[0, FEW // 2, FEW - 1]], alone)
    text = "largest change of a row, each at its own t, when the rest of its batch is taken away"
    if gap > _same(p):
        return gap, "fail", text + ": rows are mixed, or one t is used for all of them"
    return gap, "pass", text


@torch.no_grad()
def _finite(p: BaseProbe, times: tuple[float, ...], hint: str) -> Answer:
    bad = []
    for t in times:
        x1, v = p.x1(p.few, t), p.base.velocity(p.few, p.few.new_full((FEW,), t), **p.few_rows())
        rows = ~torch.isfinite(torch.stack([x1, v])).flatten(2).all(2).all(0)
        if bool(rows.any()):
            bad.append((t, int(rows.sum())))
    if bad:
        (t, n), total = bad[0], sum(n for _, n in bad)
        return total, "fail", f"X̂_1 or v is NaN or infinite at t = {t:g} in {n} of {FEW} rows{hint}"
    return 0, "pass", f"X̂_1 and v are finite at t = {', '.join(f'{t:g}' for t in times)}"


def finite_start(p: BaseProbe) -> Answer:
    """Where every chain and every solver begins."""
    return _finite(p, (0.0,), ": every chain starts there")


def finite_between(p: BaseProbe) -> Answer:
    """On the way."""
    return _finite(p, (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999), "")


@torch.no_grad()
def finite_end(p: BaseProbe) -> Answer:
    """At the data, where nothing in this library evaluates a network."""
    t = torch.ones(FEW).to(p.few)
    out = p.call(p.few, t)
    bad = int((~torch.isfinite(out)).flatten(1).any(1).sum())
    if bad:
        return bad, "warn", f"its output is NaN or infinite at t = 1 in {bad} of {FEW} rows: no chain evaluates it there"
    return 0, "pass", "its output is finite at t = 1"


def with_model(base: Process, model: Any) -> Process:
    """The same process around another network."""
    return replace(base, model=model)
