r"""`tiltflow bench tilt`: Adjoint Matching on the analytic problems, against their closed forms.

Protocol: log Z, ESS and mode weights from 20,000 samples (log Z and ESS by the noising-kernel weights, since p̃* is known,
with the chain's own beside them); W2 exact by assignment at n = 2,000, mean of 10 draws, beside the mean of 10
reference–reference pairs.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.buffer import Buffer
from tiltflow.chain import InterpolantChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.control import FineTuned, tilted
from tiltflow.cost import RewardCost
from tiltflow.errors import TiltflowError
from tiltflow.fit import FitSettings, fit
from tiltflow.methods import State
from tiltflow.methods.adjoint_matching import AdjointMatching, endpoint_share
from tiltflow.metrics.distance import mean_w2, total_variation
from tiltflow.nn.mlp import MLP
from tiltflow.problems import TILT_PROBLEMS, TiltProblem
from tiltflow.process import Process
from tiltflow.simulate import Samples, ode, sample
from tiltflow.store import write_text
from tiltflow.weights import evidence

Row = dict[str, Any]


@dataclass(frozen=True)
class TiltSettings:
    """Budget of one problem.

    Args:
        steps, iterations, batch, updates, minibatch, buffer_rounds: training chain, rounds, paths per round, gradient steps
            per round and their rows, rounds kept.
        hidden, layers: of the trained correction.
        sample_steps, samples: of the evaluation.
        w2_samples, w2_draws: rows of one assignment problem, and how many of them.
    """

    steps: int = 60
    iterations: int = 250
    batch: int = 256
    updates: int = 8
    minibatch: int = 8192
    buffer_rounds: int = 20
    learning_rate: float = 2e-3
    hidden: int = 128
    layers: int = 4
    sample_steps: int = 100
    samples: int = 20_000
    w2_samples: int = 2_000
    w2_draws: int = 10


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
) -> Process:
    """Fine-tune a correction of the closed-form base by Adjoint Matching; returns the fine-tuned process.

    The loss is weighted by path weights, a part of its target is the path's own end point (see
    :func:`tiltflow.methods.adjoint_matching.endpoint_share`), and mini-batches mix the rows of many rounds: on separated
    modes the plain estimator needs far more paths. ``chain`` replaces the memoryless one.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the initial weights of the network
    dim = problem.base.means.shape[1]
    net = MLP(2 * dim, dim, settings.hidden, settings.layers)
    control = FineTuned(tilted(problem.process(), net))
    chain, cost = chain or chain_of(problem, settings.steps, generator), RewardCost(problem.reward)
    share = endpoint_share(chain, cost, 4096, generator)
    method = AdjointMatching(chain, cost, batch=settings.batch, importance=True, endpoint_share=share)
    fit(
        method,
        State(control, generator),
        FitSettings(
            settings.iterations,
            learning_rate=settings.learning_rate,
            updates=settings.updates,
            minibatch=settings.minibatch,
            gradient_clip=float("inf"),  # rare large gradients carry the mode weights: clipping them would bias the tilt
        ),
        Buffer(settings.buffer_rounds * settings.batch * settings.steps),
        callback=callback,
    )
    return control.process


def mode_weights(problem: TiltProblem, x: Tensor) -> Tensor:
    """Share of samples nearest (in likelihood) to each component of the exact tilt."""
    counts = torch.bincount(problem.target.component(x), minlength=len(problem.target.weights))
    return counts.double() / len(x)


def evaluate(problem: TiltProblem, process: Process, seed: int, settings: TiltSettings) -> list[Row]:
    """The rows "sde" and "ode" of one trained process."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    chain = chain_of(problem, settings.sample_steps, generator)
    started = time.perf_counter()
    drawn: Samples = sample(chain, FineTuned(process), chain.source(settings.samples, generator), generator)
    sde_seconds = time.perf_counter() - started
    kernel = evidence(problem.log_target(drawn.x) + _given(drawn.log_kernel_ratio))
    own = evidence(problem.reward(drawn.x) + drawn.log_ratio)
    started = time.perf_counter()
    flowed = ode(process, chain.source(settings.samples, generator), settings.sample_steps)
    ode_seconds = time.perf_counter() - started

    reference = problem.target.sample(settings.samples, generator)
    exact = problem.target.weights
    other = problem.target.sample(settings.samples, generator)
    floor = mean_w2(reference, other, settings.w2_samples, settings.w2_draws, generator)
    rows: list[Row] = []
    for name, x, seconds in (("sde", drawn.x, sde_seconds), ("ode", flowed, ode_seconds)):
        weights = mode_weights(problem, x)
        rows.append(
            {
                "problem": problem.name,
                "method": "adjoint_matching",
                "sampler": name,
                "seed": seed,
                "w2": mean_w2(x, reference, settings.w2_samples, settings.w2_draws, generator),
                "w2_floor": floor,
                "mode_tv": total_variation(weights, exact),
                "mode_weight_error": float(((weights - exact).abs() / exact).max()),
                "sample_seconds": seconds,
                "mean_reward": float(problem.reward(x).mean()),
            }
        )
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


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "the evaluation chain is memoryless and noisy to the end"
    return value


def bench_problem(
    problem: TiltProblem, seed: int, settings: TiltSettings, callback: Callable[[Row], None] | None = None
) -> list[Row]:
    """Train and evaluate one problem: its two rows, with the budgets spent in training."""
    started = time.perf_counter()
    process = train(problem, seed, settings, callback)
    seconds = time.perf_counter() - started
    paths = settings.iterations * settings.batch
    return [
        row
        | {
            "steps": settings.steps,
            "base_evaluations": paths * settings.steps,  # base and fine-tuned share them: one vjp per path and step
            "reward_calls": paths,
            "train_seconds": seconds,
            "seconds": seconds + row["sample_seconds"],
        }
        for row in evaluate(problem, process, seed, settings)
    ]


def _bench_named(name: str, seed: int, settings: TiltSettings, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    return bench_problem(TILT_PROBLEMS[name](), seed, settings)


def bench_tilt(
    names: tuple[str, ...],
    seed: int,
    iterations: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """The rows of the named problems (all if none is named), one process per core and problem.

    Raises:
        TiltflowError: an unknown name.
    """
    unknown = [n for n in names if n not in TILT_PROBLEMS]
    if unknown:
        raise TiltflowError(f"unknown problem {unknown[0]!r}: use one of {', '.join(TILT_PROBLEMS)}.")
    chosen = names or tuple(TILT_PROBLEMS)
    workers = min(len(chosen), torch.get_num_threads())
    threads = max(1, torch.get_num_threads() // workers)
    rows: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(_bench_named, name, seed, settings_for(name, iterations), threads): name for name in chosen
        }
        for done, job in enumerate(as_completed(jobs)):
            rows[jobs[job]] = job.result()
            progress("problems", done + 1, len(chosen))
    return [row for name in chosen for row in rows[name]]


def settings_for(name: str, iterations: int | None = None) -> TiltSettings:
    """The protocol's budget: the full one for the 2-D mixtures whose mode weights are the question, less for the rest."""
    default = TiltSettings()
    rounds = default.iterations if name.startswith("mixture2d") else default.iterations // 2
    return replace(default, iterations=rounds if iterations is None else iterations)


def write_result(path: Path, document: dict[str, Any]) -> None:
    """Write a command's document as a benchmark result, with the commit it ran on and its duration."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    duration = sum(row.get("seconds", 0.0) for row in document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = document | {"commit": head.stdout.strip() or None, "duration": duration}
    write_text(path, json.dumps(stamped, indent=1) + "\n")
