r"""`tiltflow bench control`: the stochastic-optimal-control methods on problems whose exact control is known.

Two linear-quadratic problems with a running cost (Riccati) and the double well (backward equation on a grid). Error:
E∫‖u − u*‖² / E∫‖u*‖² on optimal paths and on the policy's own. The objective J and its lower bound, −log Z averaged over
starts, stand beside it. One network, one number of paths and one gradient step per round for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiltflow.bench.budget import peak_memory_mb
from tiltflow.bench.tilt import Row, run_apart
from tiltflow.core.control import NetworkControl
from tiltflow.core.value import objective
from tiltflow.methods.registry import METHODS
from tiltflow.nn.mlp import MLP
from tiltflow.problems.control import ControlProblem, control_error, double_well, linear_quadratic
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training

PROBLEMS: dict[str, Callable[[], ControlProblem]] = {
    "linear-quadratic": lambda: linear_quadratic(4),
    "linear-quadratic-hard": lambda: linear_quadratic(4, hard=True),
    "double-well": lambda: double_well(2),
}

@dataclass(frozen=True)
class ControlSettings:
    """Steps of the chain, rounds, paths per round, Adam's rate, the network, and paths of the evaluation."""

    steps: int = 40
    rounds: int = 300
    batch: int = 128
    learning_rate: float = 5e-3
    hidden: int = 64
    layers: int = 3
    paths: int = 2_000


def bench_problem(problem: str, method: str, seed: int, settings: ControlSettings, threads: int | None = None) -> list[Row]:
    """The row of one method on one problem."""
    if threads is not None:
        torch.set_num_threads(threads)
    started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    exact = PROBLEMS[problem]()
    chain = exact.chain(settings.steps)
    dim = chain.source(1, generator).shape[1]
    control = NetworkControl(MLP(dim, dim, settings.hidden, settings.layers))
    fit(
        METHODS[method].made(chain=chain, cost=exact.cost, batch=settings.batch, generator=generator),
        State(control, generator),
        Training(rounds=settings.rounds, learning_rate=settings.learning_rate, ema=0.99),
    )
    seconds = time.perf_counter() - started
    error = control_error(chain, control, exact.control, settings.paths, generator)
    found = objective(chain, control, exact.cost, settings.paths, generator)
    return [
        {
            "problem": problem,
            "method": method,
            "seed": seed,
            "control_error": error.optimal,
            "control_error_standard_error": error.optimal_error,
            "control_error_own_paths": error.own,
            "objective": float(found.value),
            "objective_standard_error": float(found.error),
            "objective_exact": float(exact.value(chain.source(settings.paths, generator), 0.0).mean()),
            "paths": settings.rounds * settings.batch,
            "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
    ]


def bench_control(
    methods: tuple[str, ...],
    seed: int,
    rounds: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """One row per problem and method."""
    settings = ControlSettings() if rounds is None else ControlSettings(rounds=rounds)
    jobs: list[Any] = [(problem, method, seed, settings) for problem in PROBLEMS for method in methods]
    return run_apart(bench_problem, jobs, progress)
