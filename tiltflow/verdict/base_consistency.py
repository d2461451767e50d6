r"""Does a base agree with itself? The question that finds a wrong direction of time, predictor, interpolant or scale.

Let X_1 be the base's own end points and x_t = α_t X_1 + β_t X_0. If the network is what it is said to be, X̂_1 = E[X_1|x_t],
so the error e = X_1 − X̂_1 has mean zero and is uncorrelated with x_t and X̂_1. What part of e they explain,

    inconsistency² = mean over t of  (‖E e‖² + E‖proj of e on x_t and X̂_1‖²) / E‖X_1 − E X_1‖²,

is 0 for a right base (up to the noise of N samples and the steps of the ODE), and is a lower bound on the error of X̂_1 in
units of the spread of the data. If it is large, the same number for the network under other readings says which one fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from tiltflow.core.chain import memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Linear
from tiltflow.core.process import Predicts, Process
from tiltflow.core.simulate import walk
from tiltflow.verdict.base_probe import BATCH, LEVELS, BaseProbe, with_model
from tiltflow.verdict.line import Status
from tiltflow.verdict.questions import Answer

CONSISTENT, INCONSISTENT = 0.06, 0.15
"""Good and bad: exact bases have up to .025 with 1,000 samples, the shipped digits .05, wrong readings .08 to 30."""
SYMMETRIC = 0.7
"""Smallest cos(Jv, Jᵀv) that is passed over: 1 for an exact denoiser; the shipped digits, a residual MLP, have .77."""
MARGINALS = (0.06, 0.15)
TIMESTEPS = 999.0


class Reading(NamedTuple):
    """Another way to read the network: the line that it belongs to, and what would be the case, in words."""

    line: str
    words: str
    base: Process


def readings(base: Process) -> Iterator[Reading]:
    """The mistakes that are made: time, timesteps, predictor, interpolant."""
    net = base.model

    def at(time: Any, sign: float = 1.0) -> Process:
        return with_model(base, lambda x, t, **c: sign * net(x, time(t), **c))

    flipped = "its time seems flipped: t = 0 is its data, so give it 1 − t"
    yield Reading("direction of time", flipped, at(lambda t: 1 - t))
    if base.predicts == "velocity":
        yield Reading("direction of time", flipped + ", and negate its velocity", at(lambda t: 1 - t, -1.0))
    yield Reading("timesteps", f"it seems to count timesteps: give it {TIMESTEPS:g}·t", at(lambda t: TIMESTEPS * t))
    words = f"it seems to count timesteps down: give it {TIMESTEPS:g}·(1 − t)"
    yield Reading("timesteps", words, at(lambda t: TIMESTEPS * (1 - t)))
    for predicts in get_args(Predicts):
        if predicts != base.predicts:
            words = f"it seems to predict {predicts}, not {base.predicts}"
            yield Reading("predictor", words, replace(base, predicts=predicts))
    for path in (Linear(), Cosine(), VP()):
        if type(path) is not type(base.interpolant):
            words = f"it seems to be trained on {type(path).__name__}, not {type(base.interpolant).__name__}"
            yield Reading("interpolant", words, replace(base, interpolant=path))


def inconsistency(p: BaseProbe) -> tuple[float, list[float]]:
    """The number above, and its value at each of ``LEVELS``; infinite where the base explodes or collapses."""
    ends = double(p.ends.flatten(1))
    n = len(ends)
    variance = float(ends.var(0).sum())
    size = variance / ends.shape[1]
    if not (1e-4 < size < 1e6):  # NaN too
        return math.inf, []
    each = []
    for t in LEVELS:
        x = p.noised(t)
        guess, x = double(p.x1(x, t).flatten(1)), double(x.flatten(1))
        error = ends - guess
        bias = float((error.mean(0).square() - error.var(0) / n).sum())
        error, x, guess = (v - v.mean(0) for v in (error, x, guess))
        features = torch.stack([x.flatten(), guess.flatten()], 1)
        fit = torch.linalg.lstsq(features, error.reshape(-1, 1), driver="gelsd").solution
        explained = float((features @ fit).square().sum()) / n - 2 * float(error.square().mean()) / n
        each.append(math.sqrt((max(bias, 0.0) + max(explained, 0.0)) / variance))
    return math.sqrt(sum(e * e for e in each) / len(each)), each


@dataclass(frozen=True)
class Consistency(BaseProbe):
    """A probe that also tries the other readings, if the base as it is declared does not fit."""

    @cached_property
    def as_declared(self) -> tuple[float, list[float]]:
        """The inconsistency of the base as it is declared."""
        return inconsistency(self)

    @cached_property
    def depends_on_t(self) -> float:
        """Relative change of the network's output at the same x between t = .1 and t = .9."""
        x = self.noised(0.5)[: len(self.few)]
        with torch.no_grad():
            a, b = (double(self.call(x, x.new_full((len(x),), t))) for t in (0.1, 0.9))
        scale = max(float(a.square().mean().sqrt()), float(b.square().mean().sqrt()), 1e-30)
        return float((a - b).square().mean().sqrt()) / scale

    @cached_property
    def best(self) -> tuple[float, Reading] | None:
        """The reading with the smallest inconsistency, if it fits, and far better than the declared one; else None."""
        tried: list[tuple[float, Reading]] = []
        for reading in readings(self.base):
            probe = BaseProbe(reading.base, self.generator, self.samples, self.steps, self.conditions)
            probe.__dict__.update(x0=self.x0, rows=self.rows)
            try:
                tried.append((inconsistency(probe)[0], reading))
            except Exception:
                continue  # a reading that cannot be evaluated is none
        declared = self.as_declared[0] if self.sensitive else math.inf
        fitting = [pair for pair in tried if pair[0] <= min(self.limit, declared / 2)]
        return min(fitting, key=lambda pair: pair[0], default=None)

    @property
    def sensitive(self) -> bool:
        """Whether the output depends on t enough to have been trained on [0, 1]."""
        return self.depends_on_t > 0.02

    @property
    def right(self) -> bool:
        """Whether no other reading needs to be tried."""
        return self.as_declared[0] <= self.limit and self.sensitive

    @property
    def limit(self) -> float:
        """What an exact base may have from this many samples."""
        return CONSISTENT * max(1.0, math.sqrt(1_000 / self.samples))


def consistency(p: Consistency) -> Answer:
    """The base agrees with itself as it is declared."""
    number, each = p.as_declared
    if not each:
        return None, "fail", "the end points of its ODE explode, collapse or are not finite: see 'magnitude'"
    shown = ", ".join(f"{e:.2g}" for e in each)
    text = f"how far X̂_1 is from E[X_1|x] on the base's own samples, in spreads of the data; at t = {LEVELS}: {shown}"
    if number <= p.limit:
        return number, "pass", text
    if p.best:
        return number, "fail", f"{text}: see {p.best[1].line!r}"
    status: Status = "warn" if number <= INCONSISTENT else "fail"
    return number, status, text + ": no other reading fits; is it trained, right at t = 0, and not scaled?"


def _reading(line: str, p: Consistency) -> Answer:
    if p.right:
        return p.as_declared[0], "pass", "the base is consistent as declared"
    if p.best is None:
        return None, "cannot tell" if p.as_declared[0] > INCONSISTENT else "pass", "no other reading fits better"
    number, reading = p.best
    if reading.line != line:
        return None, "cannot tell", f"see {reading.line!r}"
    text = f"{reading.words}: it would be consistent to {number:.2g}, and is to {p.as_declared[0]:.2g} as declared"
    return number, "fail", text


def direction(p: Consistency) -> Answer:
    """t = 0 is noise."""
    return _reading("direction of time", p)


def predictor(p: Consistency) -> Answer:
    """The network predicts what is said."""
    return _reading("predictor", p)


def interpolant(p: Consistency) -> Answer:
    """The network was trained on the path that is said."""
    return _reading("interpolant", p)


def timesteps(p: Consistency) -> Answer:
    """Times in [0, 1] mean something to the network."""
    change = p.depends_on_t
    text = "relative change of the output from t = .1 to t = .9"
    if p.right:
        return change, "pass", text
    if p.best and p.best[1].line == "timesteps":
        return change, "fail", f"{text}: {p.best[1].words} ({p.best[0]:.2g} for {p.as_declared[0]:.2g} inconsistent)"
    if not p.sensitive:
        status: Status = "warn" if p.as_declared[0] <= p.limit else "fail"
        return change, status, text + ": it hardly depends on t; does it expect integer timesteps?"
    return change, "pass", text


def magnitude(p: BaseProbe) -> Answer:
    """End points of the order of the source."""
    end, source = (float(double(x).square().mean().sqrt()) for x in (p.ends, p.x0))
    if not math.isfinite(end):
        return None, "fail", "the end points of its ODE are not finite: it explodes on the way"
    ratio = end / max(source, 1e-30) if source else end
    text = f"root mean square of the end points, {end:.3g}, over the source's, {source:.3g}"
    if not (1e-2 <= ratio <= 1e2):
        return ratio, "fail", text + ": it explodes or collapses; is its output scaled, or its data not normalised?"
    if not (0.05 <= ratio <= 20):
        return ratio, "warn", text + ": scale the data to about one"
    return ratio, "pass", text


def noise_end(p: Consistency) -> Answer:
    """X̂_1(x, 0) is E[X_1], whatever x is: there is no signal in the noise."""
    if not p.right and p.best:
        return None, "cannot tell", f"see {p.best[1].line!r}"
    x1 = [double(p.x1(x, 0.0).flatten(1)) for x in (p.x0, p.x0.flip(0))]  # the same conditions, another x
    varies = float((x1[0] - x1[1]).square().mean()) / 2
    shift = float((x1[0] - double(p.ends.flatten(1))).mean(0).square().mean())
    off, over = math.sqrt(varies + shift) / p.spread, math.sqrt(varies) / p.spread
    text = f"error of X̂_1(x, 0), which must be E[X_1] for every x, in spreads of the data ({over:.2g} over x)"
    if p.base.predicts in ("eps", "score"):
        text += "; it is a limit, the network's derivative in t, which training hardly fixes"
    if not off <= 0.5:
        return off, "fail", text + ": the first step is wrong; a network that predicts the velocity or x1 has no such limit"
    return off, "pass" if off <= 0.2 else "warn", text


@torch.no_grad()
def noise_output(p: Consistency) -> Answer:
    """For eps and score where α_0 = 0: their output at t = 0 is known exactly, and any error there is divided by α."""
    zero = torch.zeros(1, dtype=torch.float64)
    path = p.base.interpolant
    if p.base.predicts not in ("eps", "score") or float(path.alpha(zero)) > 0 or float(path.beta(zero)) == 0:
        return None, "pass", "nothing is divided by α = 0"
    if not p.right and p.best:
        return None, "cannot tell", f"see {p.best[1].line!r}"
    beta, first = float(path.beta(zero)), float(path.alpha(zero + 1 / p.steps))
    exact = p.few / beta if p.base.predicts == "eps" else -p.few / beta**2
    error = float(double(p.call(p.few, p.few.new_zeros(len(p.few))) - exact).square().mean().sqrt())
    gain = float(path.beta(zero + 1 / p.steps)) ** (1 if p.base.predicts == "eps" else 2) / first
    reached = error * gain / p.spread
    what = "eps(x, 0) − x" if p.base.predicts == "eps" else "s(x, 0) + x"
    text = (
        f"{what} is {error:.2g} (root mean square) for 0; in X̂_1 at the first of {p.steps} steps that is {reached:.2g} "
        "spreads of the data"
    )
    if not reached <= 0.5:
        return reached, "fail", text + ": convert the network to predict the velocity or x1, or take fewer steps near t = 0"
    return reached, "pass" if reached <= 0.1 else "warn", text


def marginals(p: BaseProbe) -> Answer:
    """The chain that fine-tuning simulates has, at every t_k, the moments of its own end points noised."""
    n, base, path = min(p.samples, 2 * BATCH), p.base, p.base.interpolant
    t = uniform_grid(p.steps)
    rows = {name: v[:n] for name, v in p.rows.items()}
    chain = memoryless_chain(base, t, residual_variance(base, t, p.ends[:n], p.generator, **rows))
    with torch.no_grad():
        states = [p.x0[:n], *(s.x_next for s in walk(chain, None, p.x0[:n], p.generator, **rows))]
    moments = [(x.mean(0), x.var(0)) for x in (double(state.flatten(1)) for state in states)]
    mean, variance = moments[-1]
    worst, where = 0.0, 0
    for k, (m, v) in enumerate(moments[1:-1], 1):
        alpha, beta = float(path.alpha(t[k])), float(path.beta(t[k]))
        expected = alpha**2 * variance + beta**2
        shift = float((m - alpha * mean).square().sum() - (v + alpha**2 * variance).sum() / n)
        shift = math.sqrt(max(shift, 0.0) / float(expected.sum()))
        spread = float(((v / expected).sqrt() - 1).square().mean()) - 1 / n  # each ratio is known to about 1/√n
        off = max(shift, math.sqrt(max(spread, 0.0)))
        if not off <= worst:
            worst, where = off, k
    text = f"largest relative error of a marginal's means or spreads (root mean square), at t = {float(t[where]):.3g}"
    if not worst <= MARGINALS[1]:
        advice = "take more steps, or scale the coordinates alike"
        return worst, "fail", f"{text}: the chain's paths are not the noising kernel's; {advice}"
    return worst, "pass" if worst <= MARGINALS[0] else "warn", text


def denoiser(p: BaseProbe) -> Answer:
    """J = ∂X̂_1/∂x is symmetric for a conditional mean (it is a covariance): cos(Jv, Jᵀv) = 1 and |Jᵀv| = |Jv|."""
    shown, worst = [], 1.0
    rows = p.few_rows()
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        x = p.noised(t)[: len(p.few)].requires_grad_(True)
        v = torch.randn(x.shape, generator=p.generator, dtype=x.dtype, device=p.generator.device).to(x)
        with torch.enable_grad():
            out = p.base.x1(x, x.new_full((len(x),), t), **rows)
            w = torch.zeros_like(out, requires_grad=True)
            back = torch.autograd.grad(out, x, w, create_graph=True)[0]
            forth = torch.autograd.grad(back, w, v, retain_graph=True)[0]
            back = torch.autograd.grad(out, x, v)[0]
        a, b = (double(j.flatten(1)) for j in (forth, back))
        cosine = float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)).mean())
        ratio = float((b.norm(dim=1) / a.norm(dim=1).clamp_min(1e-300)).mean())
        worst = min(worst, cosine)
        shown.append(f"{t:g}: {cosine:.3f}, {ratio:.3f}")
    text = "smallest mean cos(Jv, Jᵀv), J = ∂X̂_1/∂x; at t: cos, |Jᵀv|/|Jv|: " + "; ".join(shown)
    if not worst >= SYMMETRIC:
        return worst, "warn", text + ": not the Jacobian of a conditional mean, so adjoints and forward sensitivities differ"
    return worst, "pass", text


def differentiable(p: BaseProbe) -> Answer:
    """A gradient passes through the network to x, which adjoints need."""
    with torch.enable_grad():
        x = p.few.clone().requires_grad_(True)
        out = p.call(x, p.mixed_times)
        grad = torch.autograd.grad(out.sum(), x, allow_unused=True)[0] if out.requires_grad else None
    if grad is None:
        return None, "fail", "the network is detached from x: remove torch.no_grad() and .detach() from it"
    bad = int((~torch.isfinite(grad)).flatten(1).any(1).sum())
    return bad, "fail" if bad else "pass", f"{bad} of {len(x)} gradients in x are NaN or infinite"


@torch.no_grad()
def conditioned(p: BaseProbe) -> Answer:
    """The output depends on the condition."""
    if not p.rows:
        return None, "pass", "no conditions were given"
    x, n = p.few, len(p.few)
    own = double(p.call(x, p.mixed_times))
    turned = {name: v.roll(1, 0) if isinstance(v, Tensor) else v for name, v in p.few_rows(n).items()}
    other = p.base.model(x, p.mixed_times, **turned)
    change = float((own - double(other)).square().mean().sqrt() / own.square().mean().sqrt().clamp_min(1e-30))
    text = f"relative change of the output when conditions ({', '.join(p.rows)}) change places"
    return change, "pass" if change > 1e-6 else "warn", text + ("" if change > 1e-6 else ": it ignores them")


def starts_at(base: Process, tuned: Process, x: Tensor, t: Tensor, rows: dict[str, Any]) -> float:
    """Largest |X̂_1 of ``tuned`` − X̂_1 of ``base``| at (x, t) over the root mean square of the base's; infinite if NaN."""
    with torch.no_grad():
        a, b = double(base.x1(x, t, **rows)), double(tuned.x1(x, t, **rows))
    if a.shape != b.shape:
        raise TiltflowError(f"`tuned` returns {tuple(b.shape)} where the base returns {tuple(a.shape)}.")
    gap = float((a - b).abs().max() / a.square().mean().sqrt().clamp_min(1e-30))
    return gap if math.isfinite(gap) else math.inf
