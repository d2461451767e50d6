"""How few simulation steps does training need?

``python benchmarks/few_steps.py --seed 0 --out benchmarks/results/few-steps-0.json``

Every variant trains on `mixture2d` with at most a quarter of the base-model evaluations of the 40-step reference (the first
row), and is judged as `tiltflow bench tilt` judges: 20,000 samples of 100 steps and of the ODE.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltflow.bench.budget import Budget, Counter
from tiltflow.bench.result import publish
from tiltflow.bench.tilt import METHOD, TiltSettings, bench_problem, chain_of, evaluate, run_apart, train
from tiltflow.core.chain import InterpolantChain, memoryless_chain, power_grid, residual_variance
from tiltflow.problems.tilt import TiltProblem, mixture2d

Row = dict[str, Any]
# name: (method, steps, exponents of the grid at its start and end)
VARIANTS: dict[str, tuple[str, int, tuple[float, float]]] = {
    "plain Adjoint Matching, 10 steps": ("adjoint_matching_plain", 10, (1, 1)),
    "path weights and buffer, 10 steps": ("adjoint_matching", 10, (1, 1)),
    "and re-noised end points, 10 steps": (METHOD, 10, (1, 1)),
    "the same, grid finer at the start": (METHOD, 10, (1.5, 1)),
    "the same, grid finer at the end": (METHOD, 10, (1, 1.5)),
    "the same, 5 steps": (METHOD, 5, (1, 1)),
    "re-noised end points alone, path weights, 10 steps": ("path_weighted", 10, (1, 1)),
    "re-noised end points alone, base samples, 10 steps": ("reward_weighted", 10, (1, 1)),
    "log-variance, 10 steps": ("log_variance", 10, (1, 1)),
}


def grid_chain(problem: TiltProblem, steps: int, exponents: tuple[float, float], seed: int) -> InterpolantChain:
    """The memoryless chain on a power grid."""
    generator = torch.Generator().manual_seed(seed)
    if exponents == (1, 1):
        return chain_of(problem, steps, generator)
    t, x1 = power_grid(steps, *exponents), problem.base.sample(4_000, generator)
    return memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))


def variant(name: str, seed: int, budget: int, threads: int) -> list[Row]:
    """The rows of one variant."""
    torch.set_num_threads(threads)
    problem, counter, started = mixture2d(), Counter(), time.perf_counter()
    method, steps, exponents = VARIANTS[name]
    settings = replace(TiltSettings(), steps=steps, budget=Budget(budget, 10**9))
    chain = grid_chain(problem, steps, exponents, seed)
    process = train(problem, seed, settings, chain=chain, method=method, counter=counter)
    spent = {
        "base_evaluations": counter.base,
        "reward_calls": counter.reward,
        "seconds": time.perf_counter() - started,
    }
    return [{"variant": name, "steps": steps, "seed": seed} | r | spent for r in evaluate(problem, process, seed, settings)]


def reference(seed: int, threads: int) -> list[Row]:
    """The 40-step rows."""
    torch.set_num_threads(threads)
    name = "reference: Adjoint Matching, 40 steps"
    return [{"variant": name} | row for row in bench_problem(mixture2d(), seed, TiltSettings())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        print(f"{what}: {done}/{total}", file=sys.stderr)

    rows = run_apart(reference, [(arguments.seed,)], progress)
    quarter = rows[0]["base_evaluations"] // 4
    rows += run_apart(variant, [(name, arguments.seed, quarter) for name in VARIANTS], progress)
    publish(rows, arguments.seed, arguments.out, started)


if __name__ == "__main__":
    main()
