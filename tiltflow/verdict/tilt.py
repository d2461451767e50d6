r"""The verdict: is the sampler right? Evidence from samples, base, cost and path weights, never from a method's name.

The reference is either exact samples of p*, where somebody has them, or the base's own samples weighted by e^{−g}
(forward-side evidence: it sees a mode that the sampler lost). Every way of sampling that a user can choose is held against
it: as drawn by the chain, by the ODE, and exactly, the chain's paths weighted by their path weights. A reference of fewer
than 200 effective draws vouches for nothing, for or against. The rules of :mod:`tiltflow.verdict.line` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltflow.core.cost import Cost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.progress import Tell, silent
from tiltflow.core.weights import evidence
from tiltflow.verdict.line import (
    AS_DRAWN,
    BY_ODE,
    EXACT,
    REWARD,
    SIGMAS,
    Line,
    Score,
    Status,
    Verdict,
    best_way,
    graded,
)
from tiltflow.verdict.weighted import Weighted, own_neighbours

REGIONS, BATCH, ENOUGH = 10, 1_000, 200
Sets = Mapping[str, Tensor]
BASE, TRUTH = "base", "truth"
"""Names of sets of samples beside the ways of sampling."""


def scored(
    cost: Cost, judges: Mapping[str, Callable[[Tensor], Tensor]], sets: Sets, tell: Tell = silent
) -> dict[str, dict[str, Tensor]]:
    """−g and every judge's scores, (n,) each on the CPU, of every set of samples: a score is asked once per sample.

    Args:
        cost: g.
        judges: Held-out scores by name, (x) → (B,).
        sets: Samples by name: as drawn, of the base; by the ODE and exact ones (truth) if there are any.
        tell: Told what is going on: (what, done, total, note).
    """
    asked = {REWARD: lambda x: -cost.value(x), **judges}
    total = sum(len(x) for x in sets.values())
    found: dict[str, dict[str, Tensor]] = {}
    for name, score in asked.items():
        found[name], done = {}, 0
        for key, x in sets.items():
            parts = []
            for rows in x.split(BATCH):
                parts.append(score(rows.clone()).detach().cpu())
                done += len(rows)
                tell(f"scores: {name}", done, total, "")
            found[name][key] = torch.cat(parts)
    return found


def judge_samples(
    sets: Sets,
    values: Mapping[str, Sets],
    log_ratio: Tensor | None,
    generator: torch.Generator,
    features: Callable[[Tensor], Tensor] | None = None,
    strength: float = 1.0,
    tell: Tell = silent,
) -> Verdict:
    """Compare a sampler with p* ∝ p_base e^{−g}, in every way that it can be sampled.

    Args:
        sets: (n, *event) by name: as drawn, of the base by the same kind of simulation, by the ODE if it has one, and truth,
            exact samples of p*, if there are any; then the base samples only give the regions and the scale.
        values: :func:`scored` of them.
        log_ratio: (N,) log dP_base/dP_u of the paths that made those as drawn (None: no path evidence, hence no exact way).
        generator: For bootstrap, clustering and subsets.
        features: Map in which regions and diversity are measured (default: the flattened sample).
        strength: λ, so that the scores state the reward itself; 0: nothing was to change.
        tell: Told what is going on: (what, done, total, note).

    Raises:
        TiltflowError: empty or non-finite samples.
    """
    for name, x in sets.items():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum()) if len(x) else 0
        if not len(x) or bad:
            raise TiltflowError(f"samples {name}: {len(x)} rows, {bad} of them not finite; a verdict needs finite ones.")
    flat = {name: (features or (lambda x: x.flatten(1)))(x).cpu() for name, x in sets.items()}
    even = {name: torch.zeros(len(x), dtype=torch.float64) for name, x in flat.items()}
    base = Weighted(flat[BASE], even[BASE], generator)
    tilt = Weighted(flat[BASE], values[REWARD][BASE].double(), generator)
    exact = Weighted(flat[TRUTH], even[TRUTH], generator) if TRUTH in sets else tilt
    found = Reference(TRUTH if TRUTH in sets else BASE, exact, base, generator)
    ways = {way: Weighted(flat[way], even[way], generator) for way in (AS_DRAWN, BY_ODE) if way in sets}
    lines = [found.size_line()]
    if log_ratio is not None:
        log_w = values[REWARD][AS_DRAWN].double() + log_ratio.cpu().double()
        ways[EXACT] = Weighted(flat[AS_DRAWN], log_w, generator)
        if strength:
            lines += trusted(tilt, [_effect_line(tilt, log_ratio)])
    for done, (way, mine) in enumerate(ways.items()):
        tell("verdict", done, len(ways), way)
        own = trusted(exact, found.lines(mine, values, AS_DRAWN if way == EXACT else way))
        if way == AS_DRAWN and log_ratio is not None:
            own.append(_bound_line(ways[EXACT]))
        if way == EXACT:
            own = trusted(mine, [*own, *trusted(tilt, [_log_z_line(mine.log_w, tilt.log_w)])])
            own.append(_size_line("effective draws", mine.size, "effective number of the paths under their weights"))
        lines += [line._replace(way=way) for line in own]
    tell("verdict", len(ways), len(ways), "")
    return best_way(lines, list(_scores(ways, found, values, strength)))


def trusted(rows: Weighted, lines: Iterable[Line]) -> list[Line]:
    """Lines that lean on these rows: without an answer if they are worth too few draws."""
    return [line if rows.size >= ENOUGH else line._replace(status="cannot tell") for line in lines]


@dataclass(frozen=True)
class Reference:
    """What stands for p*, and the base that it is compared on.

    Args:
        name: The set that it is made of.
        target: Rows weighted so that they follow p*.
        base: Rows of the base.
        generator: For clustering.
    """

    name: str
    target: Weighted
    base: Weighted
    generator: torch.Generator

    def size_line(self) -> Line:
        """Whether there are enough of them."""
        text = "effective number of samples that stand for the tilt; draw more, or lower the strength"
        return _size_line("reference effective size", self.target.size, text)

    def lines(self, mine: Weighted, values: Mapping[str, Sets], of: str) -> Iterator[Line]:
        """What one way of sampling is asked: means of scores, regions, diversity, repetition."""
        for name, scores in values.items():
            yield self._mean_line(name, mine, scores[of], scores)
        yield from self._region_lines(mine)
        yield self._diversity_line(mine)
        share, error, n = own_neighbours(mine, self.target)
        text = f"share of {n} samples whose nearest neighbour is one of them, not of {n} draws of the tilt, less one half"
        yield graded("own neighbours", max(share - 0.5, 0.0) if share == share else share, error, 0.15, 0.3, text)

    def _mean_line(self, name: str, mine: Weighted, reached_values: Tensor, values: Sets) -> Line:
        shown, base = name if name == REWARD else f"held-out {name}", values[BASE].double()
        spread = float(base.std())
        if not spread > 1e-6 * float(base.abs().max()):
            return Line(f"{shown} gap", None, None, None, "", "cannot tell", "this score is constant on the base's samples")
        reached, exact = mine.mean(reached_values), self.target.mean(values[self.name])
        start = self._start(values[BASE])
        gap = exact - start
        scale = "λ r: " if name == REWARD else ""
        text = f"{scale}base {float(start[0]):.4g} → reached {float(reached[0]):.4g}, exact tilt {float(exact[0]):.4g}"
        if not float(gap.std()) * SIGMAS <= abs(float(gap[0])):  # this score barely moves under the exact tilt
            difference, error = abs(float(reached[0] - exact[0])) / spread, float((reached - exact)[1:].std()) / spread
            text += "; the tilt hardly moves this score"
            return graded(f"{shown} mean (in base std)", difference, error, 0.1, 0.25, text)
        relative = (reached - exact) / gap
        text += "; distance to the exact value as a fraction of the gap from the base"
        return graded(f"{shown} gap", abs(float(relative[0])), float(relative[1:].std()), 0.10, 0.25, text)

    def _start(self, values: Tensor) -> Tensor:
        """The base's mean, in the same resamples as the reference if it is made of the same rows."""
        return (self.target if self.name == BASE else self.base).plain_mean(values)

    @cached_property
    def _centres(self) -> Tensor:
        """k-means centres of the base's samples."""
        from scipy.cluster.vq import kmeans2

        x = self.base.x
        cells = min(REGIONS, max(2, len(x) // 50))
        pool = x[torch.randperm(len(x), generator=self.generator)[:5000]].double()
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        return torch.from_numpy(kmeans2(pool.numpy(), cells, minit="++", rng=seed)[0])

    @cached_property
    def _shares(self) -> Tensor:
        return self.target.shares(self._centres)

    @cached_property
    def _diversity(self) -> tuple[float, float]:
        return self.target.diversity()

    def _region_lines(self, mine: Weighted) -> list[Line]:
        """Shares of the regions under the sampler and under the tilt, and the one that the sampler neglects most."""
        p, q = mine.shares(self._centres), self._shares
        distance = 0.5 * (p - q).abs().sum(1)
        noise = distance[1:] - distance[0]  # the bootstrap repeats the upward bias of |·|: take it off once
        value = max(float(distance[0] - noise.mean()), 0.0)
        text = f"shares of {len(self._centres)} regions of the base's samples under the sampler and under the tilt"
        lines = [graded("region weights (total variation)", value, float(distance[1:].std()), 0.05, 0.08, text)]
        return [*lines, self._coverage_line(mine, p)]

    def _coverage_line(self, mine: Weighted, p: Tensor) -> Line:
        """The lowest share ratio: a region whose interval is below ½ is lost; above it are only those that can be told."""
        q, name, threshold = self._shares, "coverage", "lowest share ratio ≥ 0.5"
        doubt, ratio = q[1:].std(0) / q[0].clamp_min(1e-12), p / q.clamp_min(1e-12)
        few = 1 / (mine.size * q[0]).clamp_min(1e-12)  # relative variance of a share of so many samples
        error = torch.maximum(ratio[1:].std(0), few)  # an empty region has no bootstrap spread
        known = SIGMAS * doubt < 0.5
        lost = known & (ratio[0] + SIGMAS * error < 0.5)
        telling = lost if bool(lost.any()) else known & ((SIGMAS + 1) * (doubt**2 + few).sqrt() < 0.5)
        if not bool(telling.any()):
            return Line(name, None, None, None, threshold, "cannot tell", "no region's share is known well enough")
        worst = int(torch.where(telling, ratio[0], torch.inf).argmin())
        value, wide = float(ratio[0, worst]), SIGMAS * float(error[worst])
        status: Status = "fail" if bool(lost.any()) else "pass" if value - wide > 0.5 else "cannot tell"
        reached, wanted = float(p[0, worst]), float(q[0, worst])
        text = f"worst of {int(telling.sum())} regions that can be told: share {reached:.4f} where the tilt has {wanted:.4f}"
        return Line(name, value, max(value - wide, 0.0), value + wide, threshold, status, text)

    def _diversity_line(self, mine: Weighted) -> Line:
        (own, own_error), (exact, exact_error) = mine.diversity(), self._diversity
        ratio = own / exact
        error = ratio * ((own_error / own) ** 2 + (exact_error / exact) ** 2) ** 0.5 if own > 0 else 0.0
        text = f"mean pairwise distance {own:.4g}, under the exact tilt {exact:.4g}"
        return graded("diversity |ratio − 1|", abs(ratio - 1), error, 0.1, 0.2, text)


def _size_line(name: str, size: float, text: str) -> Line:
    status: Status = "pass" if size >= ENOUGH else "cannot tell"
    return Line(name, size, None, None, f"≥ {ENOUGH}", status, f"{text}; below {ENOUGH} it vouches for nothing")


def _effect_line(tilt: Weighted, log_ratio: Tensor) -> Line:
    """Whether anything was learned: KL(P_u ‖ P_base) as a share of KL(P* ‖ P_base) = E*[log w] − log E[w]."""
    log_forward = tilt.log_w
    shift = log_forward.max()
    kl = tilt.mean(log_forward) - tilt.plain_mean((log_forward - shift).exp()).log() - shift
    own = -log_ratio.cpu().double()
    error = float(kl[1:].std())
    if not float(kl[0]) > SIGMAS * error:
        text = f"the tilt is {float(kl[0]):.3g} ± {error:.2g} nats from the base: too weak for these samples to see"
        return Line("effect", float(kl[0]), None, None, "> 0", "cannot tell", text)
    value = float(own.mean()) / float(kl[0])
    spread = SIGMAS * float(own.std()) / len(own) ** 0.5 / float(kl[0])
    status: Status = "fail" if value + spread < 0.1 else "pass" if value - spread > 0.1 else "cannot tell"
    text = f"KL of the sampler's paths from the base's, {float(own.mean()):.4g}, over that of the tilt, {float(kl[0]):.4g}"
    return Line("effect", value, value - spread, value + spread, "≥ 0.1: else it is still the base", status, text)


def _bound_line(exact: Weighted) -> Line:
    """χ²(P* ‖ P_u) = 1/ESS − 1, hence TV ≤ ½√(1/ESS − 1)."""
    share = exact.size / len(exact.log_w)
    bound = 0.5 * (1 / share - 1) ** 0.5
    status: Status = "cannot tell" if exact.size < 10 else "pass" if bound <= 0.25 else "warn"
    text = f"no event's probability is further off; from the path weights' effective share, {share:.3f}, if no mode is lost"
    return Line("total variation at most", bound, None, None, "≤ 0.25 good", status, text)


def _log_z_line(log_weights: Tensor, log_forward: Tensor) -> Line:
    reverse, forward = evidence(log_weights), evidence(log_forward)
    error = (reverse.log_z_error**2 + forward.log_z_error**2) ** 0.5
    text = (
        f"{reverse.log_z:.4f} from the sampler's paths, {forward.log_z:.4f} from the base's; E[log w] = {reverse.elbo:.4f}, "
        "and the gap to log Z is KL(sampler's paths ‖ tilt)"
    )
    return graded("log Z from both sides", abs(reverse.log_z - forward.log_z), error, 0.05, 0.15, text)


def _scores(
    ways: Mapping[str, Weighted], found: Reference, values: Mapping[str, Sets], strength: float
) -> Iterator[Score]:
    """What each score came to, the reward in its own unit."""
    for name, own in values.items():
        unit = (strength or 1.0) if name == REWARD else 1.0
        means = {way: float(mine.mean(own[AS_DRAWN if way == EXACT else way])[0]) / unit for way, mine in ways.items()}
        start, best = float(own[BASE].double().mean()) / unit, float(found.target.mean(own[found.name])[0]) / unit
        yield Score(name, start, best, means[AS_DRAWN], means.get(BY_ODE), means.get(EXACT))
