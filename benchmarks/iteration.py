"""Milliseconds of one round of Adjoint Matching: ``python benchmarks/iteration.py --out benchmarks/results/iteration.json``

2-D, 256 samples, 40 steps, a 3-layer network of 64 units that corrects a closed-form mixture base: simulation, adjoint and
one gradient step on all 10,240 rows. Median of 30 rounds after 5; goal: 120 ms on two cores.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from tiltflow.bench.result import publish
from tiltflow.bench.tilt import chain_of
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


def milliseconds(importance: bool, rounds: int = 35) -> list[float]:
    """Duration of each round after the first five."""
    problem, generator = mixture2d(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    method = AdjointMatching(chain_of(problem, 40, generator), RewardCost(problem.reward), 256, importance=importance)
    control, marks = FineTuned(tilted(problem.process(), MLP(4, 2))), []
    fit(method, State(control, generator), Training(rounds=rounds), callback=lambda row: marks.append(time.perf_counter()))
    return [1e3 * (b - a) for a, b in pairwise(marks[4:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = []
    for importance in (False, True):
        times = milliseconds(importance)
        spread = {"lowest_ms": min(times), "highest_ms": max(times)}
        rows.append({"importance": importance, "median_ms": median(times)} | spread)
    publish(rows, 0, arguments.out, started, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
