"""How often is the verdict on a sampler of an energy wrong? Samplers that are wrong on purpose, and honest ones.

    python benchmarks/sampler_verdict.py --seeds 5 > benchmarks/results/sampler-verdict.json

The judged samples are exact draws, of which 2, 5 or 10 % of the mass is removed (a tail in energy, a tail of one coordinate,
a mode), or whose temperature is 5 % off; their path weights are those of a sampler that cannot know it. Each is judged with
nothing known (held against an independent classical run), with log Z and mode weights, and with reference samples. A false
pass is a wrong one that passes; a false fail an honest one that fails.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tiltflow
from tiltflow.core.device import double
from tiltflow.energies import ENERGY_PROBLEMS, EnergyProblem, Modes
from tiltflow.energies.mixtures import IsotropicMixture
from tiltflow.problems.tilt import GaussianMixture
from tiltflow.sampling.assess import assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.evidence import beside_classical, classical
from tiltflow.sampling.settings import EVIDENCE
from tiltflow.verdict.sampler import judge_sampler

SAMPLES, COMPARED = 10_000, 500
REMOVED = (0.02, 0.05, 0.1)


def modes(name: str, weights: list[float], dim: int, spread: float) -> EnergyProblem:
    """Unit Gaussians at random places, the lightest last."""
    means = spread * torch.randn(len(weights), dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    energy = IsotropicMixture(torch.tensor(weights, dtype=torch.float64), means, 1.0)
    known = Modes(means, energy.weights)
    scale = float((means.square().mean() + 1).sqrt())
    return EnergyProblem(
        name=name, energy=energy, event_shape=(dim,), scale=scale, finest=0.1, sample=energy.sample, log_z=0.0, modes=known
    )


def student(dim: int, dof: int) -> EnergyProblem:
    """A product of Student's t."""
    each = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(dof * math.pi)

    def energy(x: Tensor) -> Tensor:
        return (0.5 * (dof + 1) * torch.log1p(x**2 / dof)).sum(1)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        z, chi = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, dim), (dof, n, dim)))
        return (z * (dof / chi.square().sum(0)).sqrt()).float()

    return EnergyProblem(
        name=f"student-{dof}, {dim}-D", energy=energy, event_shape=(dim,), scale=4.0, finest=0.1, sample=sample,
        log_z=-dim * each,
    )  # fmt: skip


def gaussian(dim: int) -> EnergyProblem:
    """Standard deviations from ½ to 2."""
    std = torch.linspace(0.5, 2, dim, dtype=torch.float64)
    law = GaussianMixture.gaussian([1.0] * dim, std.square().diag().tolist())
    return EnergyProblem(
        name=f"gaussian, {dim}-D", energy=lambda x: -law.log_prob(x), event_shape=(dim,), scale=3.0, finest=0.05,
        sample=law.sample, log_z=0.0,
    )  # fmt: skip


def problems() -> list[EnergyProblem]:
    """What is sampled."""
    return [
        gaussian(2), gaussian(12), student(4, 2), student(2, 3), ENERGY_PROBLEMS["ring"](),
        modes("2 modes, 2-D", [0.95, 0.05], 2, 4.0), modes("4 modes, 3-D", [0.5, 0.3, 0.1, 0.1], 3, 4.0),
        modes("5 modes, 8-D", [0.4, 0.3, 0.2, 0.08, 0.02], 8, 2.0),
    ]  # fmt: skip


def twins(problem: EnergyProblem, generator: torch.Generator) -> Iterator[tuple[str, bool, Tensor, float]]:
    """Name, whether it is honest, samples, and the mass that is left."""
    assert problem.sample is not None
    pool = problem.sample(5 * SAMPLES, generator)
    energy = double(problem.energy(pool))
    yield "exact", True, pool[:SAMPLES], 1.0
    for share in REMOVED:
        for name, value in (("tail in energy", energy), ("tail of a coordinate", double(pool[:, 0]))):
            kept = pool[value <= value.sort().values[round((1 - share) * len(value)) - 1]]
            yield f"{name}, {share:.0%}", False, kept[:SAMPLES], 1 - share
    colder = torch.rand(len(pool), generator=generator) < (-(energy - energy.min()) * (1 / 0.95 - 1)).exp()
    yield "temperature, 5 % cold", False, pool[colder][:SAMPLES], 1.0
    if problem.modes is not None:
        nearest = torch.cdist(double(pool), problem.modes.centres).argmin(1)
        light = int(problem.modes.weights.argmin())
        weight = float(problem.modes.weights[light])
        yield f"a mode, {weight:.0%}", False, pool[nearest != light][:SAMPLES], 1 - weight


def verdicts(problem: EnergyProblem, seed: int) -> Iterator[dict[str, Any]]:
    """Every twin of a problem, with all kinds of knowledge."""
    generator = torch.Generator().manual_seed(seed)
    unknown = replace(problem, sample=None, log_z=None, modes=None)
    run, said = classical(unknown, problem.energy, EVIDENCE, torch.Generator().manual_seed(1_000 + seed))
    assert run is not None, said
    for name, honest, x, left in twins(problem, generator):
        weights = 0.5 * torch.randn(len(x), generator=generator, dtype=torch.float64) - 0.125
        drawn = Drawn(x, problem.energy(x), weights + math.log(left) + (problem.log_z or 0.0))
        beside = beside_classical(problem, drawn, run)
        for known, seen in (
            ("nothing", unknown), ("log Z and modes", replace(problem, sample=None)), ("reference", problem),
        ):  # fmt: skip
            row = assess_all(seen, drawn, None, None, generator, COMPARED).row
            found = judge_sampler(row if known == "reference" else row | beside)
            yield {
                "kind": "case", "problem": problem.name, "case": name, "honest": honest, "known": known, "seed": seed,
                "answer": found.status, "wrong": found.status == ("fail" if honest else "pass"),
                "lines": {line.name: line.status for line in found.lines if line.status != "pass"},
            }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Counts of answers by kind of twin and knowledge, and the two rates."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["known"]), []).append(row)
        groups.setdefault(("false fail" if row["honest"] else "false pass", row["known"]), []).append(row)
        groups.setdefault(("false fail" if row["honest"] else "false pass", "all"), []).append(row)
    for (case, known), group in groups.items():
        answers = Counter(row["answer"].replace(" ", "_") for row in group)
        counts = {answer: answers[answer] for answer in ("pass", "warn", "cannot_tell", "fail")}
        wrong = sum(row["wrong"] for row in group)
        head = {"kind": "summary", "case": case, "known": known, "verdicts": len(group)}
        yield {**head, **counts, "wrong": wrong, "share": wrong / len(group)}


def main() -> None:
    """Print one document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started, rows = time.process_time(), list[dict[str, Any]]()
    for problem in problems():
        for seed in range(given.seed, given.seed + given.seeds):
            rows += verdicts(problem, seed)
            print(problem.name, seed, Counter(row["answer"] for row in rows[-30:]), file=sys.stderr)
    clock = {"kind": "clock", "processor_seconds": time.process_time() - started, "threads": torch.get_num_threads()}
    document = {
        "command": " ".join(["python", "benchmarks/sampler_verdict.py", *sys.argv[1:]]), "version": tiltflow.__version__,
        "seed": given.seed, "device": "cpu", "verdict": None, "rows": [*summary(rows), clock, *rows],
    }  # fmt: skip
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
