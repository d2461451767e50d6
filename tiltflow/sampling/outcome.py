"""A sampler judged: its verdict, the numbers that it rests on, and what a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.geometry import Centred
from tiltflow.core.progress import Tell, silent
from tiltflow.core.weights import normalised
from tiltflow.energies import Energy, EnergyProblem, Evaluator
from tiltflow.report import Figures, gallery, training_blocks
from tiltflow.report.figures import SAMPLING, distance_figures, energy_figures, weight_figures
from tiltflow.report.page import Block
from tiltflow.report.tables import sampler_table
from tiltflow.run.job import Outcome
from tiltflow.sampling.assess import Assessed, assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.evidence import beside_classical, classical
from tiltflow.verdict.sampler import judge_sampler

EVALUATION_SEED, EVIDENCE_SEED = 10_000, 20_000
"""Added to the seed for the samples that are judged, and for what they are held against."""


Drawable = Any
"""A :class:`~tiltflow.sampling.model.Sampler`, whose module imports this one."""


def outcome(
    sampler: Drawable,
    samples: int,
    compared: int,
    evidence: int,
    seed: int,
    notes: Sequence[str] = (),
    tell: Tell = silent,
) -> Outcome:
    """Draw, compare, judge.

    Args:
        sampler: What is judged.
        samples: Samples that are drawn.
        compared: Of them those that distances to the reference are computed on.
        evidence: Energies at most for an independent classical run, where there is no reference.
        seed: Of all draws.
        notes: Sentences for the report.
        tell: Told what is going on.
    """
    spent = spent_on(sampler.energy) | {"train_seconds": sum(h["seconds"] for h in sampler.history)}
    tell("samples", 0, samples, "")
    drawn = sampler.sample(samples, EVALUATION_SEED + seed)
    tell("samples", samples, samples, "")
    tell("distances", 0, 1, "")
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    assessed = assess_all(sampler.problem, drawn, sampler.chain, sampler.control, generator, compared)
    tell("distances", 1, 1, "")
    assessed, said = with_evidence(sampler.problem, sampler.energy.energy, drawn, assessed, evidence, seed, tell)
    return judged(sampler.problem, sampler.method, drawn, assessed, sampler.history, spent, [*notes, *said])


def with_evidence(
    problem: EnergyProblem, energy: Energy, drawn: Drawn, assessed: Assessed, budget: int, seed: int, tell: Tell
) -> tuple[Assessed, list[str]]:
    """The row with an independent classical run where there is no reference, and what to say of that run."""
    if assessed.reference is not None:
        return assessed, []
    tell("independent run", 0, 1, "")
    generator = torch.Generator(drawn.x.device).manual_seed(EVIDENCE_SEED + seed)
    found, said = classical(problem, energy, budget, generator)
    entries = {} if found is None else beside_classical(problem, drawn, found)
    tell("independent run", 1, 1, "")
    return assessed._replace(row=assessed.row | entries), [said]


def judged(
    problem: EnergyProblem,
    method: str,
    drawn: Drawn,
    assessed: Assessed,
    history: Sequence[Mapping[str, Any]],
    spent: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Outcome:
    """The outcome of samples that are drawn and assessed."""
    row = assessed.row
    return Outcome(
        title=f"{problem.name}, sampled by {method}",
        summary={
            "problem": problem.name, "method": method, **row, "median_energy": float(drawn.energy.median()), **spent,
        },
        verdict=judge_sampler(row),
        tensors=tensors_of(drawn),
        history=[dict(h) for h in history],
        facts={"ESS, of 1": row["ess"]} if row.get("ess") is not None else {},
        notes=notes,
        draw=lambda: _blocks(problem, history, drawn, assessed),
    )  # fmt: skip


def spent_on(energy: Evaluator) -> dict[str, int]:
    """What was asked of the energy."""
    return {f"energy_{name}": count for name, count in energy.report().items()}


def tensors_of(drawn: Drawn) -> dict[str, Tensor]:
    """x, energy and, if there are any, log_weights."""
    return {name: value for name, value in drawn._asdict().items() if value is not None and name != "groups"}


def _blocks(
    problem: EnergyProblem, history: Sequence[Mapping[str, Any]], drawn: Drawn, assessed: Assessed
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    row, reference = assessed
    energy = None if reference is None else problem.energy(reference).detach()
    particles = isinstance(problem.geometry, Centred)
    sets, median = {"Samples": drawn.x, "Reference": reference}, None if energy is None else float(energy.median())
    laws = energy_figures({"samples": drawn.energy, "reference": energy})
    laws += distance_figures({"samples": drawn.x, "reference": reference}) if particles else []
    laws += weight_figures(None if drawn.log_weights is None else normalised(drawn.log_weights))
    levels = {"energy": {"reference": median}, "log_z": {"reference": problem.log_z}}
    blocks: list[Block] = [gallery(sets, particles=particles), Figures("", laws), sampler_table(row, problem.log_z)]
    return blocks, training_blocks(history, SAMPLING, levels)
