"""What one round of Adjoint Matching costs: ``python benchmarks/iteration.py --out benchmarks/results/iteration.json``

* "round": 2-D, 256 samples, 40 steps, a 3-layer network of 64 units that corrects a closed-form mixture base: simulation,
  adjoint and one gradient step on the rows of 40 or of 20 steps. Medians of 30 rounds after 5.
* "overhead": simulation, adjoint and loss beside nothing but network calls on batches of the same shapes: the trained module
  forward at each step; the base forward and one vector–Jacobian product at each step; the trained network forward and
  backward on all rows. In 2-D as above, and for digits with low-rank updates of rank 32, 96 samples and 25 steps. The two
  take turns; ratios are medians over pairs.

Milliseconds by the clock, and of processor time, of all threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tiltflow.bench.result import Row, publish
from tiltflow.bench.tilt import chain_of
from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.chain import InterpolantChain, memoryless_chain, uniform_grid
from tiltflow.core.control import Blend, FineTuned, Tilt, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.simulate import simulate
from tiltflow.digits.weights import load_digits_base
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import mixture2d
from tiltflow.tilting.chain import trainable_copy, tuned_process
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


@dataclass(frozen=True)
class Job:
    """What is fine-tuned, by how many paths; ``inputs`` of the network at states x (n, *event)."""

    chain: InterpolantChain
    control: FineTuned
    cost: RewardCost
    batch: int
    inputs: Callable[[Tensor], Tensor]


def plane() -> Job:
    """The 2-D mixture, tilted."""
    problem = mixture2d()
    torch.manual_seed(0)
    chain = chain_of(problem, 40, torch.Generator().manual_seed(0))
    control = FineTuned(tilted(problem.process(), MLP(4, 2)))
    return Job(chain, control, RewardCost(problem.reward), 256, lambda x: torch.cat([x, x], -1))


def digits() -> Job:
    """The shipped base of digits, with low-rank updates."""
    base, steps = load_digits_base(), 25
    chain = memoryless_chain(base, uniform_grid(steps), torch.full((steps,), 0.05), noiseless_last=True)
    control = FineTuned(tuned_process(base, trainable_copy(base, 32)))
    return Job(chain, control, RewardCost(lambda x: x.mean((1, 2, 3))), 96, lambda x: x)


def rounds(count: int = 35, **options: Any) -> Row:
    """One training of the 2-D job: its rounds after the first five."""
    job = plane()
    method = AdjointMatching(job.chain, job.cost, job.batch, **options)
    history = fit(method, State(job.control, torch.Generator().manual_seed(0)), Training(rounds=count))[5:]
    wall = [1e3 * row["seconds"] for row in history]
    busy = median(1e3 * row["processor_seconds"] for row in history)
    return {"median_ms": median(wall), "lowest_ms": min(wall), "highest_ms": max(wall), "processor_ms": busy}


def parts(job: Job) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, the library's part, and its bare network calls."""
    generator, module, base = torch.Generator().manual_seed(0), job.control.module, job.chain.base
    assert isinstance(module, Blend | Tilt)
    steps, x0, t = len(job.chain.std), job.chain.source(job.batch, generator), torch.full((job.batch,), 0.3)
    method = AdjointMatching(job.chain, job.cost, job.batch)
    path, rows = simulate(job.chain, job.control, x0, generator), method.collect(State(job.control, generator)).material
    inputs, times = job.inputs(rows["x"]), torch.rand(len(rows["x"]), generator=generator)

    def walk() -> None:
        with parametrize.cached():
            simulate(job.chain, job.control, x0, generator)

    @torch.no_grad()
    def forward() -> None:
        with parametrize.cached():
            for _ in range(steps):
                module(x0, t)

    def products() -> None:
        for _ in range(steps):
            x = x0.detach().requires_grad_(True)
            torch.autograd.grad(base.model(x, t), x, x0)

    def gradient(loss: Callable[[], Tensor]) -> None:
        module.zero_grad()
        loss().backward()

    yield "simulate", walk, forward
    yield "adjoint", lambda: lean_adjoint(job.chain, path, job.cost), products
    yield (
        "loss",
        lambda: gradient(lambda: method.loss(job.control, rows, generator)),
        lambda: gradient(lambda: module.net(inputs, times).square().mean()),
    )


def overheads(name: str, job: Job, repeats: int) -> Iterator[Row]:
    """The parts of a round beside their bare network calls, in turns, after one of each."""
    for part, whole, bare in parts(job):
        spent: list[list[tuple[float, float]]] = [[], []]
        for _ in range(repeats + 1):
            for mine, run in zip(spent, (whole, bare), strict=True):
                wall, busy = time.perf_counter(), time.process_time()
                run()
                mine.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)))
        row: Row = {"kind": "overhead", "network": name, "part": part}
        for i, clock in enumerate(("", "processor_")):
            mine, calls = ([v[i] for v in side[1:]] for side in spent)
            row |= {f"{clock}ms": median(mine), f"bare_{clock}ms": median(calls)}
            row[f"{clock}ratio"] = median(a / b for a, b in zip(mine, calls, strict=True))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started, rows = time.perf_counter(), []
    for importance in (False, True):
        for few in (False, True):
            steps = {"last_steps": 10, "random_steps": 10} if few else {}
            head = {"kind": "round", "importance": importance, "regressed": 20 if few else 40}
            rows.append(head | rounds(importance=importance, **steps))
    rows += [*overheads("2-D", plane(), 30), *overheads("digits", digits(), 7)]
    publish(rows, 0, arguments.out, started, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
