r"""`tiltflow bench sampling`: samplers of e^{−E} side by side, and parallel tempering as the classical one.

Protocol: 10,000 samples (LJ13 4,000, LJ55 1,000: they cost most); log Z and ESS from all of them, distances from 2,000
(LJ55: 500) beside their floors (:mod:`~tiltflow.sampling.assess`). Each method has the settings that suit it and the
problem (:meth:`~tiltflow.sampling.settings.SamplerSettings.of`). Counted during training only: calls of the energy and
rows it evaluated (an energy with its gradient is one), rows through the network, gradient steps, seconds of clock and
processor.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tiltflow.bench.names import AUTOMATIC, COLUMNS, SAMPLING, TEMPERING
from tiltflow.bench.tilt import run_apart
from tiltflow.core.errors import TiltflowError
from tiltflow.energies import EnergyProblem
from tiltflow.methods.tempering import temper
from tiltflow.sampling.assess import assess_all
from tiltflow.sampling.automatic import sample
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.model import Sampler
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.outcome import EVALUATION_SEED
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.train import network, train_sampler

Row = dict[str, Any]
SAMPLES, COMPARED, PILOT = 10_000, 2_000, 1_000
FEWER = {"lj13": (4_000, COMPARED), "lj55": (1_000, 500)}  # samples, and those compared
NAMES = SAMPLING
GENTLER: dict[tuple[str, str], dict[str, Any]] = {
    ("gmm40", "idem"): {"gradient_steps": 20},
    ("lj13", "pis"): {"batch": 64},
    ("lj13", "dds"): {"batch": 64},
}
"""Settings of a method where the problem's diverge or do not fit: after 100 gradient steps on few end points iDEM's next
ones are at 10⁸; a gradient through 60 steps of 512 clusters takes more than 21 GB.
"""


def bench_sampling(
    problems: tuple[str, ...],
    methods: tuple[str, ...],
    seed: int,
    rounds: int | None = None,
    minutes: float | None = None,
    reference: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """One row per problem and method, each in a process of its own.

    Args:
        problems: names, or module:function giving an EnergyProblem. methods: of :data:`NAMES`.
        rounds: rounds of training (parallel tempering: kept moves) instead of the default.
        minutes: instead of ``rounds``: as many rounds (moves) as fit this time on the threads in use, judged by the
            processor time of a pilot of a few.
        reference: a NumPy file (N, *event) to compare with instead of the problem's own samples; one problem only.

    Raises:
        TiltflowError: an unknown problem, a reference that does not fit, rounds and minutes together, or for stages that end
            by themselves.
    """
    if reference is not None and len(problems) != 1:
        raise TiltflowError(f"--reference is for one --problem, got {len(problems)}.")
    if minutes is not None and rounds is not None:
        raise TiltflowError(f"give --rounds or --minutes, not both; got {rounds} and {minutes:g}.")
    if AUTOMATIC in methods and (rounds is not None or minutes is not None):
        raise TiltflowError(f"the stages of {AUTOMATIC!r} end by themselves: leave out --rounds and --minutes.")
    for name in problems:
        _problem(name, reference)
    jobs = [(name, method, seed, rounds, minutes, reference) for name in problems for method in methods]
    return run_apart(_bench_apart, jobs, progress)


def _bench_apart(
    name: str, method: str, seed: int, rounds: int | None, minutes: float | None, reference: Path | None, threads: int
) -> list[Row]:
    torch.set_num_threads(threads)
    try:
        return [bench_one(_problem(name, reference), name, method, seed, rounds, minutes)]
    except TiltflowError as error:  # a method that diverges is a result, and must not cost the others theirs
        return [dict.fromkeys(COLUMNS) | {"problem": name, "method": method, "seed": seed, "error": str(error)}]


def bench_one(
    problem: EnergyProblem, name: str, method: str, seed: int, rounds: int | None = None, minutes: float | None = None
) -> Row:
    """The row of one method on one problem."""
    row: Row = dict.fromkeys(COLUMNS) | {"problem": name, "method": method, "seed": seed}
    samples, compared = FEWER.get(name, (SAMPLES, COMPARED))
    budget = None if minutes is None else 60 * minutes * torch.get_num_threads()  # of processor seconds
    trained: Sampler | None = None
    numbers: Row = {}
    if method == AUTOMATIC:
        busy = time.process_time()
        found = sample(problem, samples, seed=seed)
        spent = {"seconds": found.seconds, "processor_seconds": time.process_time() - busy, "network_evaluations": 0}
        spent |= {"energy_calls": found.energy.calls, "energy_evaluations": found.energy.evaluations, "gradient_steps": 0}
        drawn, numbers = found.drawn, found.numbers
    elif method == TEMPERING:
        plan = problem.tempering
        if budget is not None:
            *_, pilot = temper(problem, replace(plan, steps=PILOT, burn_in=0), seed, samples)
            rounds = max(1, int(budget * PILOT / (1.5 * pilot["processor_seconds"])))
        plan = plan if rounds is None else replace(plan, steps=rounds, burn_in=rounds // 2)
        x, energy, spent = temper(problem, plan, seed, samples)
        drawn = Drawn(x, energy, None)
    else:
        settings = SamplerSettings.of(method, problem.settings, **GENTLER.get((name, method), {}))
        if budget is not None:
            pilot_rounds = train_sampler(problem, method, replace(settings, rounds=4), seed=seed).history[1:]
            rounds = max(1, int(budget / median(r["processor_seconds"] for r in pilot_rounds)))
        settings = settings if rounds is None else replace(settings, rounds=rounds)
        with counted_rows(type(network(problem, settings)[0])) as through:
            started, busy = time.perf_counter(), time.process_time()
            trained = train_sampler(problem, method, settings, seed=seed)
            spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - busy}
        spent |= {
            "energy_calls": trained.energy.calls,
            "energy_evaluations": trained.energy.evaluations,
            "network_evaluations": through["rows"],
            "gradient_steps": settings.rounds * settings.gradient_steps,
            "rounds": settings.rounds,
            "steps": settings.steps,
        }
        started = time.perf_counter()
        drawn = trained.sample(samples, seed=EVALUATION_SEED + seed)
        spent["sample_seconds"] = time.perf_counter() - started
    chain, control = (None, None) if trained is None else (trained.chain, trained.control)
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    return row | assess_all(problem, drawn, chain, control, generator, compared).row | numbers | spent


@contextmanager
def counted_rows(kind: type[nn.Module]) -> Iterator[Counter[str]]:
    """Counts the rows ("rows") that go through modules of one class, whoever calls them."""
    counter: Counter[str] = Counter()

    def see(module: nn.Module, args: Any, out: Any) -> None:
        if type(module) is kind:
            counter["rows"] += len(args[0])

    hook = register_module_forward_hook(see)
    try:
        yield counter
    finally:
        hook.remove()


def _problem(name: str, reference: Path | None) -> EnergyProblem:
    problem = load_problem(name)
    if reference is None:
        if problem.reference is not None:
            problem.reference()  # missing samples are found before anything is trained
        return problem
    try:
        samples = torch.from_numpy(np.load(reference, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise TiltflowError(f"--reference {reference}: not a NumPy file of numbers ({error}).") from error
    if samples.ndim == 2 and samples.shape[1] == math.prod(problem.event_shape):  # stored flat
        samples = samples.reshape(-1, *problem.event_shape)
    if samples.shape[1:] != problem.event_shape or not bool(torch.isfinite(samples).all()):
        raise TiltflowError(
            f"--reference {reference}: finite samples of shape (N, {', '.join(map(str, problem.event_shape))}) are needed, "
            f"got {tuple(samples.shape)}."
        )
    return replace(problem, sample=None, reference=partial(problem.geometry.wrap, samples))
