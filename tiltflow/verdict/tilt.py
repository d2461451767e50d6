r"""The verdict: is the sampler right? Evidence from samples, base, cost and path weights, never from a method's name.

The reference is either exact samples of p*, where somebody has them, or the base's own samples weighted by e^{−g}
(forward-side evidence: it sees a mode that the sampler lost). The rules of
:mod:`tiltflow.verdict.line` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess, evidence, normalised
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.verdict.line import REWARD, SIGMAS, Line, Score, Status, Verdict, graded, overall

RESAMPLES, REGIONS, BATCH = 200, 10, 1_000
Tell = Callable[[str, int, int, str], None]


def scored(
    cost: Cost, judges: Mapping[str, Callable[[Tensor], Tensor]], *sets: Tensor, tell: Tell = lambda *news: None
) -> dict[str, list[Tensor]]:
    """−g and every judge's scores, (n,) each on the CPU, of the samples of each set: every score is asked once per sample.

    Args:
        cost: g.
        judges: Held-out scores by name, (x) → (B,).
        sets: Samples of the sampler, of the base, and exact ones if there are any.
        tell: Told what is going on: (what, done, total, note).
    """
    asked = {REWARD: lambda x: -cost.value(x), **judges}
    return {name: [_scored(name, score, x, tell) for x in sets] for name, score in asked.items()}


def _scored(name: str, score: Callable[[Tensor], Tensor], x: Tensor, tell: Tell) -> Tensor:
    parts = []
    for start in range(0, len(x), BATCH):
        parts.append(score(x[start : start + BATCH]).detach().cpu())
        tell(f"scores: {name}", min(start + BATCH, len(x)), len(x), "")
    return torch.cat(parts)


def judge_samples(
    samples: Tensor,
    base_samples: Tensor,
    values: Mapping[str, Sequence[Tensor]],
    log_ratio: Tensor | None,
    generator: torch.Generator,
    truth: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    strength: float = 1.0,
) -> Verdict:
    """Compare a sampler with p* ∝ p_base e^{−g}.

    Args:
        samples: (N, *event) of the sampler.
        base_samples: (M, *event) of the base, by the same kind of simulation as ``samples``.
        values: :func:`scored` of samples, base samples, and truth if there is any.
        log_ratio: (N,) log dP_base/dP_u of the paths that made the samples (None: no path evidence).
        generator: For bootstrap, clustering and subsets.
        truth: Exact samples of p*, if there are any; then the base samples only give the regions and the scale.
        features: Map in which regions and diversity are measured (default: the flattened sample).
        strength: λ, so that the scores state the reward itself.

    Raises:
        TiltflowError: empty or non-finite samples.
    """
    for name, x in (("samples", samples), ("base_samples", base_samples)):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum()) if len(x) else 0
        if not len(x) or bad:
            raise TiltflowError(f"{name}: {len(x)} rows, {bad} of them not finite; the verdict needs finite samples.")
    whole, reference = features or (lambda x: x.flatten(1)), base_samples if truth is None else truth
    mine, base, exact = (whole(x).cpu() for x in (samples, base_samples, reference))
    log_forward = values[REWARD][1]
    log_w = log_forward if truth is None else torch.zeros(len(truth))
    lines = [] if truth is not None else [_forward_ess(log_w)]
    lines += [_mean_line(name, found, log_w, generator) for name, found in values.items()]
    lines += _region_lines(mine, base, exact, log_w, generator)
    lines.append(_diversity_line(mine, exact, log_w, generator))
    if log_ratio is not None:
        lines += _path_lines(values[REWARD][0] + log_ratio.cpu(), log_forward)
    weight, scores = normalised(log_w), []
    for name, found in values.items():
        unit = (strength or 1.0) if name == REWARD else 1.0
        reached, start, best = (v.double() / unit for v in (found[0], found[1], found[-1]))
        scores.append(Score(name, float(start.mean()), float(weight @ best), float(reached.mean())))
    return Verdict(overall(lines), lines, scores)


def _poisson(n: int, generator: torch.Generator) -> Tensor:
    """Bootstrap multiplicities (RESAMPLES + 1, n); row 0 is the sample itself."""
    counts = torch.poisson(torch.ones(RESAMPLES, n, dtype=torch.float64), generator=generator)
    return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])


def _means(values: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Weighted mean of ``values`` (n, …) in each resample."""
    w = counts * weight.double()
    return (w @ values.double().reshape(len(values), -1)) / w.sum(1, keepdim=True)


def _forward_ess(log_w: Tensor) -> Line:
    size = ess(log_w) * len(log_w)
    status: Status = "pass" if size >= 200 else "cannot tell"
    text = (
        "effective number of base samples that stand for the tilt; below 200 the reference is too poor to vouch for "
        "anything (draw more, or lower the strength)"
    )
    return Line("reference effective size", size, None, None, "≥ 200", status, text)


def _mean_line(name: str, values: Sequence[Tensor], log_w: Tensor, generator: torch.Generator) -> Line:
    """The mean of a score: values of the sampler, of the base, and of exact samples (if the base stands for them: two)."""
    reached_values, base, exact_values = values[0], values[1], values[-1]
    weight = normalised(log_w) * len(log_w)
    shown, spread = name if name == REWARD else f"held-out {name}", float(base.double().std())
    if not spread > 1e-6 * float(base.double().abs().max()):
        return Line(f"{shown} gap", None, None, None, "", "cannot tell", "this score is constant on the base's samples")
    reached = _means(reached_values, torch.ones(len(reached_values)), _poisson(len(reached_values), generator))[:, 0]
    shared = _poisson(len(exact_values), generator)
    exact = _means(exact_values, weight, shared)[:, 0]
    start_counts = shared if len(values) == 2 else _poisson(len(base), generator)
    start = _means(base, torch.ones(len(base)), start_counts)[:, 0]
    gap = exact - start
    scale = "λ r: " if name == REWARD else ""
    text = f"{scale}base {float(start[0]):.4g} → reached {float(reached[0]):.4g}, exact tilt {float(exact[0]):.4g}"
    if not float(gap.std()) * SIGMAS <= abs(float(gap[0])):  # this score barely moves under the exact tilt
        difference = abs(float(reached[0] - exact[0])) / spread
        error = float((reached - exact)[1:].std()) / spread
        text += "; the tilt hardly moves this score"
        return graded(f"{shown} mean (in base std)", difference, error, 0.1, 0.25, text)
    relative = (reached - exact) / gap
    text += "; distance to the exact value as a fraction of the gap from the base"
    return graded(f"{shown} gap", abs(float(relative[0])), float(relative[1:].std()), 0.10, 0.25, text)


def _region_lines(
    samples: Tensor, base: Tensor, reference: Tensor, log_w: Tensor, generator: torch.Generator
) -> list[Line]:
    """Shares of the regions (k-means cells of base and reference together) under the sampler and under the tilt."""
    from scipy.cluster.vq import kmeans2

    cells = min(REGIONS, max(2, len(base) // 50))
    pool = base[torch.randperm(len(base), generator=generator)[:5000]].double()
    seed = int(torch.randint(2**31, (1,), generator=generator))
    centres = torch.from_numpy(kmeans2(pool.numpy(), cells, minit="++", rng=seed)[0])

    def shares(x: Tensor, weight: Tensor) -> Tensor:
        nearest = torch.cdist(x.double(), centres).argmin(1)
        return _means(torch.nn.functional.one_hot(nearest, cells), weight, _poisson(len(x), generator))

    p = shares(samples, torch.ones(len(samples)))
    q = shares(reference, normalised(log_w) * len(log_w))
    distance = 0.5 * (p - q).abs().sum(1)
    noise = distance[1:] - distance[0]  # the bootstrap repeats the upward bias of |·|: take it off once
    value = max(float(distance[0] - noise.mean()), 0.0)
    error = float(distance[1:].std())
    lines = [
        graded(
            "region weights (total variation)",
            value,
            error,
            0.05,
            0.08,
            f"shares of {cells} regions of the base's samples under the sampler and under the tilt",
        )
    ]
    known = q[1:].std(0) * SIGMAS < 0.5 * q[0]  # regions whose exact share is known well enough to miss
    if not bool(known.any()):
        text = "no region's share under the tilt is known to better than a sixth"
        return [*lines, Line("coverage", None, None, None, "lowest share ratio ≥ 0.5", "cannot tell", text)]
    ratio = p / q.clamp_min(1e-12)
    worst = int(torch.where(known, ratio[0], torch.inf).argmin())
    value, error = float(ratio[0, worst]), float(ratio[1:, worst].std())
    error = max(error, 1 / (len(samples) * float(q[0, worst])))  # an empty region has no bootstrap spread
    low, high = max(value - SIGMAS * error, 0.0), value + SIGMAS * error
    status: Status = "fail" if high < 0.5 else "pass" if low > 0.5 else "cannot tell"
    text = f"worst of {int(known.sum())} regions: share {float(p[0, worst]):.4f} where the tilt has {float(q[0, worst]):.4f}"
    return [*lines, Line("coverage", value, low, high, "lowest share ratio ≥ 0.5", status, text)]


def _diversity_line(samples: Tensor, reference: Tensor, log_w: Tensor, generator: torch.Generator) -> Line:
    rows = torch.randperm(len(samples), generator=generator)[:1000]
    mine, mine_error = pairwise_mean(samples[rows])
    drawn = torch.multinomial(normalised(log_w), 1000, replacement=True, generator=generator)
    exact, exact_error = pairwise_mean(reference[drawn], drawn)
    ratio = mine / exact
    error = ratio * ((mine_error / mine) ** 2 + (exact_error / exact) ** 2) ** 0.5 if mine > 0 else 0.0
    text = f"mean pairwise distance {mine:.4g}, under the exact tilt {exact:.4g}"
    return graded("diversity |ratio − 1|", abs(ratio - 1), error, 0.1, 0.2, text)


def _path_lines(log_weights: Tensor, log_forward: Tensor) -> list[Line]:
    reverse, forward = evidence(log_weights), evidence(log_forward)
    difference = abs(reverse.log_z - forward.log_z)
    error = (reverse.log_z_error**2 + forward.log_z_error**2) ** 0.5
    text = f"{reverse.log_z:.4f} from the sampler's paths, {forward.log_z:.4f} from the base's"
    if reverse.ess < 0.01:
        answer: Status = "cannot tell"
    else:
        answer = "pass" if reverse.ess >= 0.3 else "warn"
    bound = f"E[log w] = {reverse.elbo:.4f} ≤ log Z; the gap is KL(sampler's paths ‖ tilt)"
    return [
        graded("log Z from both sides", difference, error, 0.05, 0.15, text),
        Line("path weights ESS", reverse.ess, None, None, "≥ 0.3 good, < 0.01 unusable", answer, bound),
    ]




