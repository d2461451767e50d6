"""A sampler judged: its verdict, the numbers that it rests on, and what a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.geometry import Centred
from tiltflow.core.progress import Tell, silent
from tiltflow.core.weights import normalised
from tiltflow.report import Figures, gallery, training_blocks
from tiltflow.report.figures import SAMPLING, distance_figures, energy_figures, weight_figures
from tiltflow.report.page import Block
from tiltflow.report.tables import sampler_table
from tiltflow.run.job import Outcome
from tiltflow.sampling.assess import Assessed, assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.verdict.sampler import judge_sampler

EVALUATION_SEED = 10_000
"""Added to the seed for the samples that are judged."""


Drawable = Any
"""A :class:`~tiltflow.sampling.model.Sampler`, whose module imports this one."""


def outcome(
    sampler: Drawable, samples: int, compared: int, seed: int, notes: Sequence[str] = (), tell: Tell = silent
) -> Outcome:
    """Draw, compare, judge.

    Args:
        sampler: What is judged.
        samples: Samples that are drawn.
        compared: Of them those that distances to the reference are computed on.
        seed: Of all draws.
        notes: Sentences for the report.
        tell: Told what is going on.
    """
    spent = {f"energy_{name}": count for name, count in sampler.energy.report().items()}
    tell("samples", 0, samples, "")
    drawn = sampler.sample(samples, EVALUATION_SEED + seed)
    tell("samples", samples, samples, "")
    tell("distances", 0, 1, "")
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    assessed = assess_all(sampler.problem, drawn, sampler.chain, sampler.control, generator, compared)
    tell("distances", 1, 1, "")
    row = assessed.row
    return Outcome(
        title=f"{sampler.problem.name}, sampled by {sampler.method}",
        summary={
            "problem": sampler.problem.name,
            "method": sampler.method,
            **row,
            "median_energy": float(drawn.energy.median()),
            **spent,
            "train_seconds": sum(h["seconds"] for h in sampler.history),
        },
        verdict=judge_sampler(row),
        tensors=tensors_of(drawn),
        history=sampler.history,
        facts={"path ESS, of 1": row["ess"]} if row.get("ess") is not None else {},
        notes=notes,
        draw=lambda: _blocks(sampler, drawn, assessed),
    )


def tensors_of(drawn: Drawn) -> dict[str, Tensor]:
    """x, energy and, if there are any, log_weights."""
    return {name: value for name, value in drawn._asdict().items() if value is not None}


def _blocks(
    sampler: Drawable, drawn: Drawn, assessed: Assessed
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    problem, (row, reference) = sampler.problem, assessed
    energy = None if reference is None else problem.energy(reference).detach()
    particles = isinstance(problem.geometry, Centred)
    sets, median = {"Samples": drawn.x, "Reference": reference}, None if energy is None else float(energy.median())
    laws = energy_figures({"samples": drawn.energy, "reference": energy})
    laws += distance_figures({"samples": drawn.x, "reference": reference}) if particles else []
    laws += weight_figures(None if drawn.log_weights is None else normalised(drawn.log_weights))
    levels = {"energy": {"reference": median}, "log_z": {"reference": problem.log_z}}
    blocks: list[Block] = [gallery(sets, particles=particles), Figures("", laws), sampler_table(row, problem.log_z)]
    return blocks, training_blocks(sampler.history, SAMPLING, levels)
