r"""`tiltflow bench verdict`: how often the verdict is wrong, on samplers that are wrong on purpose and on honest ones.

Every case has answers that it must not get; ``wrong`` counts them over the seeds. A false pass is a known-bad sampler that
passes, a false fail an honest one that fails. Cases come with and without exact samples of the tilt (truth), and with and
without path weights, on two mixtures with a closed form and on the digits, whose tilt is a weighted pool of base samples.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.bench.names import VERDICT
from tiltflow.bench.tilt import chain_of
from tiltflow.core.chain import euler_maruyama, times, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import Samples, sample
from tiltflow.problems.tilt import TiltProblem, mixture2d, mixture32d
from tiltflow.tilting.draw import draw_paths
from tiltflow.verdict.check_base import require_base
from tiltflow.verdict.line import AS_DRAWN, BY_ODE, EXACT, Verdict
from tiltflow.verdict.tilt import BASE, TRUTH, judge_samples, scored

SAMPLES, REFERENCE, POOL = 2_000, 10_000, 40_000
STEPS, BRANCHES = 40, 16
BAD = frozenset({"pass"})
Row = dict[str, Any]
Draw = Callable[[int, torch.Generator], Tensor]


class Pool(NamedTuple):
    """Many draws of the base (n, *event), with r (n,), and which are of the mode."""

    x: Tensor
    reward: Tensor
    mode: Tensor


@dataclass(frozen=True)
class Ground:
    """What samplers are wrong on: a base, a reward (λ = 1), a held-out judge, and what is known of the tilt.

    Args:
        name: Of the base.
        process: The base.
        reward: r. judge: A score that is no function of it.
        base: Draws of the base's chain. pool: Others.
        target: Draws of the tilt.
        paths: Paths of a control that is right, or trained, with their log ratios.
        rough: Paths of a control that is far from right.
        flow: Draws of its ODE.
        mode: A set of weight between .1 and .4 under the tilt, as a mask.
        remembering: Draws of the optimum of a chain that remembers its start, σ = 1; None: not known.
    """

    name: str
    process: Process
    reward: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], Tensor]
    base: Draw
    pool: Callable[[int, torch.Generator], Pool]
    target: Draw
    paths: Callable[[int, torch.Generator], Samples]
    rough: Callable[[int, torch.Generator], Samples]
    flow: Draw
    mode: Callable[[Tensor], Tensor]
    remembering: Draw | None


class Case(NamedTuple):
    """A sampler: its sets beside the base's, the log ratios of its paths, and the answers that are wrong.

    ``way``: whose answer is looked at (None: the verdict's); ``strength``: what λ is multiplied by.
    """

    name: str
    sets: Mapping[str, Tensor]
    log_ratio: Tensor | None
    wrong: frozenset[str]
    way: str | None = None
    strength: float = 1.0


class Optimal:
    """The exact control of a closed-form problem."""

    module = None

    def __init__(self, process: Process) -> None:
        self.process = process

    def mean(self, chain: Any, k: Any, x: Tensor, base_mean: Tensor | None = None, **condition: Any) -> Tensor:
        """A x + B X̂_1 of the tilt."""
        return chain.mean(k, x, self.process.x1(x, times(chain, k, x)))

    def ratios(self, chain: Any) -> None:
        """The base's step variance."""


def closed_form(problem: TiltProblem) -> Ground:
    """A ground whose every quantity is known."""
    process, generator = problem.process(), torch.Generator().manual_seed(0)
    chain, control = chain_of(problem, STEPS, generator), Optimal(problem.optimal())
    weak = replace(problem.reward, linear=problem.reward.linear / 2, quadratic=problem.reward.quadratic / 2)
    halfway = Optimal(replace(problem, reward=weak).optimal())
    weights = problem.target.weights
    mode = int((weights - 0.25).abs().argmin())

    def walked(actor: Any, n: int, own: torch.Generator) -> Samples:
        return sample(chain, actor, chain.source(n, own), own)

    def remembering(n: int, own: torch.Generator) -> Tensor:
        """Of every start, one of many base paths by weight: the optimum of a chain with memory."""
        memory = euler_maruyama(process, uniform_grid(STEPS), Constant(1.0))
        x0 = memory.source(n, own).repeat_interleave(BRANCHES, 0)
        ends = sample(memory, None, x0, own).x.reshape(n, BRANCHES, -1)
        w = torch.softmax(problem.reward(ends.flatten(0, 1)).reshape(n, BRANCHES), 1)
        return ends[torch.arange(n), torch.multinomial(w, 1, generator=own)[:, 0]]

    def in_mode(x: Tensor) -> Tensor:
        return problem.target.component(x) == mode

    def pool(n: int, own: torch.Generator) -> Pool:
        x = problem.base.sample(n, own)
        return Pool(x, problem.reward(x), in_mode(x))

    return Ground(
        problem.name,
        process,
        problem.reward,
        lambda x: x[:, -1],
        lambda n, own: walked(None, n, own).x,
        pool,
        problem.target.sample,
        partial(walked, control),
        partial(walked, halfway),
        lambda n, own: ode(problem.optimal(), chain.source(n, own), STEPS),
        in_mode,
        remembering,
    )


def digits() -> Ground:
    """The shipped digits, thickness at λ = 3 judged by the share of ink, and a model fine-tuned with the defaults."""
    from tiltflow.digits import rewards
    from tiltflow.digits.settings import SUITED
    from tiltflow.digits.weights import load_digits_base
    from tiltflow.tilting.settings import FinetuneSettings
    from tiltflow.tilting.train import finetune

    base = load_digits_base()
    model = finetune(base, rewards.stroke_thickness, 3.0, settings=FinetuneSettings.of(suited=SUITED))
    generator = torch.Generator().manual_seed(0)
    pool = draw_paths(model.chain, None, POOL, generator).x
    mine = draw_paths(model.chain, FineTuned(model.process), POOL // 8, generator)
    flowed = torch.cat([model.sample(1_000, noise="ode", seed=i) for i in range(4)])
    known, unseen = pool[:REFERENCE], pool[REFERENCE:]

    def a_one(x: Tensor) -> Tensor:
        return torch.cat([rewards.digit_log_probability(part, 1).detach() > -0.7 for part in x.split(1_000)])

    thickness = torch.cat([3.0 * rewards.stroke_thickness(x).detach() for x in unseen.split(1_000)])
    others = Pool(unseen, thickness, a_one(unseen))

    def some(x: Tensor, n: int, own: torch.Generator) -> Tensor:
        return x[torch.randperm(len(x), generator=own)[:n]]

    def paths(n: int, own: torch.Generator) -> Samples:
        rows = torch.randperm(len(mine.x), generator=own)[:n]
        return Samples(mine.x[rows], mine.log_ratio[rows], mine.kl[rows], mine.running[rows], None)

    return Ground(
        "digits",
        base,
        lambda x: 3.0 * rewards.stroke_thickness(x),
        lambda x: (x > 0).to(x.dtype).mean((1, 2, 3)),
        partial(some, known),
        lambda n, own: others,
        lambda n, own: rejected(unseen, thickness, n, own),
        paths,
        paths,
        partial(some, flowed),
        a_one,
        None,
    )


def rejected(pool: Tensor, log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n different rows by weight: each is accepted with probability w over the weights' 99.9th percentile."""
    odds = (log_w.double() - log_w.double().quantile(0.999)).exp()
    kept = torch.nonzero(torch.rand(len(pool), generator=generator, dtype=torch.float64) < odds)[:, 0]
    return pool[kept[torch.randperm(len(kept), generator=generator)[:n]]]


def cases(ground: Ground, generator: torch.Generator) -> Iterator[Case]:
    """The samplers of one seed."""
    n, reward = SAMPLES, ground.reward
    drawn = ground.paths(n, generator)
    exact, (pool, rewards, mode) = ground.target(n, generator), ground.pool(POOL, generator)

    def by(log_w: Tensor, count: int = n) -> Tensor:
        return rejected(pool, log_w, count, generator)

    def bad(name: str, x: Tensor, log_ratio: Tensor | None = None, way: str | None = AS_DRAWN) -> Case:
        return Case(name, {AS_DRAWN: x}, log_ratio, BAD, way)

    keep = ~ground.mode(drawn.x)
    yield bad("mode dropped", drawn.x[keep], drawn.log_ratio[keep], None)
    yield bad("mode doubled", by(rewards + 0.6931 * mode))
    yield bad("strength 30 % too small", by(0.7 * rewards))
    yield bad("reward's sign flipped", by(-rewards), None, None)
    yield bad("half trained", torch.cat([exact[: n // 2], by(0 * rewards, n // 2)]))
    yield bad("one sample, jittered", exact[:1] + 0.01 * torch.randn(n, *exact.shape[1:], generator=generator))
    few = torch.arange(n) % (n // 20)
    yield bad("a twentieth, repeated", drawn.x[few], drawn.log_ratio[few], None)
    two = by(rewards, 2 * n)
    order = reward(two).detach().argsort()[: len(two) // 2 * 2].reshape(-1, 2)
    yield bad("reward hacked", two[order.gather(1, ground.judge(two)[order].argmin(1, keepdim=True))[:, 0]])
    if ground.remembering is not None:
        yield bad("constant noise", ground.remembering(n, generator))
    rough = ground.rough(n, generator)
    shuffled = rough.log_ratio[torch.randperm(n, generator=generator)]
    yield bad("path weights of another run", rough.x, shuffled, EXACT)
    doubled = 2 * (reward(rough.x).detach() + rough.log_ratio) - reward(rough.x).detach()
    yield bad("path weights squared", rough.x, doubled, EXACT)
    yield bad("nothing changed", by(0 * rewards), torch.zeros(n), None)
    honest = frozenset({"fail"})
    yield Case("exact samples", {AS_DRAWN: exact}, None, honest)
    yield Case("a reference of a few draws", {AS_DRAWN: exact}, None, frozenset({"pass", "fail"}), None, 12.0)
    sets = {AS_DRAWN: drawn.x, BY_ODE: ground.flow(n, generator)}
    for way in (AS_DRAWN, BY_ODE, EXACT):
        yield Case(f"well trained, {way}", sets, drawn.log_ratio, honest, way)


def judged(ground: Ground, case: Case, base: Tensor, truth: Tensor | None, seed: int) -> Verdict:
    """The verdict on a case."""
    cost = RewardCost(ground.reward, case.strength)
    sets = {**case.sets, BASE: base} | ({} if truth is None else {TRUTH: truth})
    values = scored(cost, {"judge": ground.judge}, sets)
    return judge_samples(sets, values, case.log_ratio, torch.Generator().manual_seed(seed), strength=case.strength)


def rows_of(ground: Ground, seed: int) -> Iterator[Row]:
    """Every case of a seed, with and without truth and path weights: its answer, and whether that is wrong."""
    generator = torch.Generator().manual_seed(seed)
    base, truth = ground.base(REFERENCE, generator), ground.target(REFERENCE // 2, generator)
    for case in cases(ground, generator):
        for exact in (False, True):
            if exact and case.strength != 1:
                continue
            for weighted in {False, case.log_ratio is not None and case.name != "a twentieth, repeated"}:
                if not weighted and case.way == EXACT:
                    continue
                one = case if weighted else case._replace(log_ratio=None)
                found = judged(ground, one, base, truth if exact else None, seed)
                answer = found.ways[case.way] if case.way else found.status
                yield {
                    "kind": "case", "base": ground.name, "case": case.name, "seed": seed, "truth": exact,
                    "path_weights": weighted, "answer": answer, "wrong": answer in case.wrong,
                    "honest": "pass" not in case.wrong,
                }  # fmt: skip
    said = door(ground.process, seed)
    yield {
        "kind": "case", "base": ground.name, "case": "base with its time flipped", "seed": seed, "truth": False,
        "path_weights": False, "answer": said, "wrong": said == "pass", "honest": False,
    }  # fmt: skip


def door(process: Process, seed: int) -> str:
    """What the check before training says of a base whose time runs the wrong way."""
    flipped = replace(process, model=lambda x, t: process.model(x, 1 - t))
    try:
        require_base(flipped, torch.Generator().manual_seed(seed))
    except TiltflowError:
        return "refused"
    return "pass"


def bench_verdict(
    seed: int = 0, seeds: int = 20, grounds: tuple[str, ...] = VERDICT, progress: Callable[..., None] = lambda *news: None
) -> list[Row]:
    """A summary row for each base and case, and one for each kind of error, then every answer.

    Args:
        seed: The first seed.
        seeds: How many.
        grounds: Bases, of :data:`~tiltflow.bench.names.VERDICT`.
        progress: Told what is going on: (what, done, total, note).
    """
    every: list[Row] = []
    started, made = time.perf_counter(), {p.name: p for p in (mixture2d(), mixture32d())}
    for name in grounds:
        progress(f"verdicts on {name}", 0, seeds, "")
        ground = digits() if name == "digits" else closed_form(made[name])
        for i in range(seeds):
            every += rows_of(ground, seed + i)
            progress(f"verdicts on {name}", i + 1, seeds, "")
    return [*summary(every), {"kind": "clock", "seconds": time.perf_counter() - started}, *every]


def summary(every: list[Row]) -> Iterator[Row]:
    """Counts of answers, by base and case, and the two rates over all."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in every:
        groups.setdefault((row["base"], row["case"]), []).append(row)
        groups.setdefault(("all", "false fail" if row["honest"] else "false pass"), []).append(row)
    for (base, case), rows in groups.items():
        answers = Counter(row["answer"] for row in rows)
        wrong = sum(row["wrong"] for row in rows)
        counts = {answer: answers[answer] for answer in ("pass", "warn", "cannot tell", "fail", "refused")}
        counts["cannot_tell"] = counts.pop("cannot tell")
        head = {"kind": "summary", "base": base, "case": case, "verdicts": len(rows)}
        yield {**head, **counts, "wrong": wrong, "share": wrong / len(rows)}
