r"""`tiltflow bench tilt`: methods on the analytic problems, against their closed forms.

Protocol: log Z, ESS and mode weights from 20,000 samples (log Z and ESS by the noising-kernel weights, since p̃* is known,
with the chain's own beside them); W2 exact by assignment at n = 2,000, mean of 10 draws, beside the mean of 10
reference–reference pairs. Without ``--methods``, Adjoint Matching at its full budget; with it, every method at the same
budget of base-model evaluations and reward calls (:mod:`tiltflow.bench.budget`). Samples of training-free methods are
resampled by their weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from tiltflow.bench.budget import Budget, Counter, counted, counted_reward, fit_within, peak_memory_mb
from tiltflow.core.chain import InterpolantChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import Samples, sample
from tiltflow.core.weights import ess, evidence, exact_draws, systematic
from tiltflow.methods.registry import METHODS
from tiltflow.metrics.distance import mean_w2, total_variation
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import TILT_PROBLEMS, TiltProblem
from tiltflow.train.settings import Training

Row = dict[str, Any]


@dataclass(frozen=True)
class TiltSettings:
    """How one problem is trained and judged.

    Args:
        steps, batch, minibatch, learning_rate: training chain, paths per round, rows per gradient step at most, Adam's rate.
        budget: rounds, or what they may cost.
        hidden, layers: of the trained correction.
        sample_steps, samples: of the evaluation.
        w2_samples, w2_draws: rows of one assignment problem, and how many of them.
    """

    steps: int = 40
    budget: Budget | int = 400
    batch: int = 256
    minibatch: int = 8192
    learning_rate: float = 2e-3
    hidden: int = 128
    layers: int = 4
    sample_steps: int = 100
    samples: int = 20_000
    w2_samples: int = 2_000
    w2_draws: int = 10


METHOD = "adjoint_matching_endpoint"
"""At the full budget: its rows of end points want a base whose X̂_1 is exact, as these are."""
WORTH = 0.1
"""Least ESS of path weights that exact samples are drawn by."""
COMPARISON = TiltSettings(budget=Budget(2_000_000, 50_000), w2_draws=3)


def chain_of(problem: TiltProblem, steps: int, generator: torch.Generator) -> InterpolantChain:
    """The memoryless chain of a problem's base, v_s estimated from exact base samples."""
    t = uniform_grid(steps)
    x1 = problem.base.sample(4_000, generator)
    return memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))


def train(
    problem: TiltProblem,
    seed: int,
    settings: TiltSettings,
    callback: Callable[[Row], None] | None = None,
    chain: InterpolantChain | None = None,
    method: str = METHOD,
    counter: Counter | None = None,
) -> Process:
    """Fine-tune a correction of the closed-form base by a named method; returns the fine-tuned process.

    ``chain`` replaces the memoryless one, ``counter`` counts what was spent.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the initial weights of the network
    dim = problem.base.means.shape[1]
    counter = counter if counter is not None else Counter()
    chain = chain or chain_of(problem, settings.steps, generator)
    base = counted(chain.base, counter)
    chain, cost = replace(chain, base=base), RewardCost(counted_reward(problem.reward, counter))
    control = FineTuned(tilted(base, MLP(2 * dim, dim, settings.hidden, settings.layers)))
    row = METHODS[method]
    fit_within(
        settings.budget,
        counter,
        row.made(chain=chain, cost=cost, batch=settings.batch, generator=generator),
        row,
        control,
        Training(
            learning_rate=settings.learning_rate,
            minibatch=settings.minibatch,
            gradient_clip=None,  # rare large gradients carry the mode weights: clipping them would bias the tilt
            ema=0.99,
        ),
        generator,
        callback,
    )
    return control.process


def mode_weights(problem: TiltProblem, x: Tensor) -> Tensor:
    """Share of samples nearest (in likelihood) to each component of the exact tilt."""
    counts = torch.bincount(problem.target.component(x), minlength=len(problem.target.weights))
    return counts.double() / len(x)


def evaluate(problem: TiltProblem, process: Process, seed: int, settings: TiltSettings) -> list[Row]:
    """Rows "sde", "ode" and, where path weights are worth it, "exact" (paths resampled by them) of one trained process."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    chain = chain_of(problem, settings.sample_steps, generator)

    def draw(n: int) -> Samples:
        return sample(chain, FineTuned(process), chain.source(n, generator), generator)

    def weighted(n: int, call: int) -> tuple[Tensor, Tensor]:
        paths = draw(n)
        return paths.x, problem.reward(paths.x) + paths.log_ratio

    started = time.perf_counter()
    drawn = draw(settings.samples)
    sde_seconds = time.perf_counter() - started
    kernel = evidence(problem.log_target(drawn.x) + _given(drawn.log_kernel_ratio))
    own = evidence(problem.reward(drawn.x) + drawn.log_ratio)
    started = time.perf_counter()
    flowed = ode(process, chain.source(settings.samples, generator), settings.sample_steps)
    ode_seconds = time.perf_counter() - started
    seconds, samples = {"sde": sde_seconds, "ode": ode_seconds}, {"sde": drawn.x, "ode": flowed}
    if own.ess >= WORTH:
        started = time.perf_counter()
        samples["exact"] = exact_draws(weighted, settings.samples, settings.samples, generator)
        seconds["exact"] = time.perf_counter() - started
    rows = [row | {"sample_seconds": seconds[row["sampler"]]} for row in judge(problem, settings, generator, **samples)]
    rows[0] |= {
        "log_z": problem.log_z,
        "log_z_error": abs(kernel.log_z - problem.log_z),
        "log_z_standard_error": kernel.log_z_error,
        "ess": kernel.ess,
        "elbo": kernel.elbo,
        "chain_log_z_error": abs(own.log_z - problem.log_z),
        "chain_ess": own.ess,
        "kl": float(drawn.kl.mean()),
    }
    return rows


def judge(problem: TiltProblem, settings: TiltSettings, generator: torch.Generator, **samples: Tensor) -> list[Row]:
    """One row per sampler against exact samples: W2 and its floor, mode weights, spread in the modes, mean reward."""
    reference, other = (problem.target.sample(settings.samples, generator) for _ in range(2))
    n, draws = settings.w2_samples, settings.w2_draws
    floor = mean_w2(reference, other, n, draws, generator)
    return [
        {"sampler": name, "w2": mean_w2(x, reference, n, draws, generator), "w2_floor": floor}
        | _moments(problem, x, reference)
        for name, x in samples.items()
    ]


def _moments(problem: TiltProblem, x: Tensor, reference: Tensor) -> Row:
    exact, weights = problem.target.weights, mode_weights(problem, x)
    return {
        "mode_tv": total_variation(weights, exact),
        "mode_weight_error": float(((weights - exact).abs() / exact).max()),
        "spread": within_modes(problem, x) / within_modes(problem, reference),
        "mean_reward": float(problem.reward(x).mean()),
        "mean_reward_exact": float(problem.reward(reference).mean()),
    }


def within_modes(problem: TiltProblem, x: Tensor) -> float:
    """Root mean squared distance of samples to the mean of the exact component they are nearest to."""
    centre = problem.target.means[problem.target.component(x)].to(x)
    return float((x - centre).square().sum(1).mean().sqrt())


def evaluate_free(problem: TiltProblem, method: str, seed: int, settings: TiltSettings, counter: Counter) -> list[Row]:
    """The row of one training-free method on the base."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    chain = chain_of(problem, settings.sample_steps, generator)
    chain = replace(chain, base=counted(chain.base, counter))
    cost = RewardCost(counted_reward(problem.reward, counter))
    started = time.perf_counter()
    drawn = METHODS[method].made(chain=chain, cost=cost).sample(None, settings.samples, generator)
    seconds = time.perf_counter() - started
    (row,) = judge(problem, settings, generator, sde=drawn.x[systematic(drawn.log_weights.double(), generator)])
    if drawn.log_z is not None:
        row |= {"log_z": problem.log_z, "log_z_error": abs(drawn.log_z - problem.log_z), "ess": ess(drawn.log_weights)}
    return [row | {"sample_seconds": seconds}]


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "the evaluation chain is memoryless and noisy to the end"
    return value


def bench_problem(
    problem: TiltProblem,
    seed: int,
    settings: TiltSettings,
    method: str = METHOD,
    callback: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train if needed and evaluate one method on one problem: a row per sampler, with what was spent."""
    started, counter = time.perf_counter(), Counter()
    if METHODS[method].trained:
        process = train(problem, seed, settings, callback, method=method, counter=counter)
        spent = {"base_evaluations": counter.base, "reward_calls": counter.reward, "steps": settings.steps}
        seconds = time.perf_counter() - started
        rows = evaluate(problem, process, seed, settings)
    else:
        rows = evaluate_free(problem, method, seed, settings, counter)
        spent = {"base_evaluations": counter.base, "reward_calls": counter.reward, "steps": settings.sample_steps}
        seconds = 0.0
    return [
        {"problem": problem.name, "method": method, "seed": seed, "biased": bool(METHODS[method].bias)}
        | row
        | spent
        | {
            "train_seconds": seconds,
            "seconds": seconds + row["sample_seconds"],
            "peak_memory_mb": peak_memory_mb(),
        }
        for row in rows
    ]


def _bench_named(name: str, method: str, seed: int, settings: TiltSettings, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    try:
        return bench_problem(TILT_PROBLEMS[name](), seed, settings, method)
    except TiltflowError as error:  # a method that diverges is a result, and must not cost the others theirs
        return [failed_row(method, seed, error) | {"problem": name, "sampler": s} for s in ("sde", "ode")]


def failed_row(method: str, seed: int, error: TiltflowError) -> Row:
    """The row of a method that could not finish."""
    return {"method": method, "seed": seed, "biased": bool(METHODS[method].bias), "error": str(error), "seconds": 0.0}


def bench_tilt(
    names: tuple[str, ...],
    seed: int,
    rounds: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    methods: tuple[str, ...] | None = None,
) -> list[Row]:
    """The rows of the named problems (all if none is named; with methods: mixture2d).

    Raises:
        TiltflowError: an unknown problem.
    """
    unknown = [n for n in names if n not in TILT_PROBLEMS]
    if unknown:
        raise TiltflowError(f"unknown problem {unknown[0]!r}: use one of {', '.join(TILT_PROBLEMS)}.")
    if methods is None:
        settings, jobs = TiltSettings(), [(n, METHOD) for n in names or tuple(TILT_PROBLEMS)]
    else:
        settings, jobs = COMPARISON, [(n, m) for n in names or ("mixture2d",) for m in methods]
    if rounds is not None:
        settings = replace(settings, budget=rounds)
    return run_apart(_bench_named, [(*job, seed, settings) for job in jobs], progress)


def run_apart(
    work: Callable[..., list[Row]], jobs: list[Any], progress: Callable[[str, int, int], None]
) -> list[Row]:
    """``work(*job, threads)`` for every job, one core and one fresh process each; the rows in the order of the jobs."""
    workers = min(len(jobs), torch.get_num_threads())
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = [pool.submit(work, *job, threads) for job in jobs]
        for done, job in enumerate(as_completed(running)):
            job.result()
            progress("jobs", done + 1, len(jobs))
    return [row for job in running for row in job.result()]
