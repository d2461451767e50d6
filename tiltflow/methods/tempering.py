"""Parallel tempering of a problem by its own plan: the classical sampler beside the learned ones (Geyer 1991)."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.cost import clip_rows
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.energies.mcmc import parallel_tempering
from tiltflow.energies.problem import base_draws
from tiltflow.energies.tempering import Tempering


def temper(
    problem: EnergyProblem, plan: Tempering, seed: int, samples: int = 10_000
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Draws of parallel tempering from relaxed draws of the base, in random order; their energies; and what they cost.

    Args:
        problem: The energy.
        plan: The ladder, chains and moves.
        seed: Of every draw.
        samples: Draws that are kept, (samples, *event) and (samples,).
    """
    generator = torch.Generator().manual_seed(seed)
    evaluator, started, busy = Evaluator(problem.energy), time.perf_counter(), time.process_time()
    x = base_draws(problem, plan.chains, generator)
    step = 0.1 * problem.finest
    for _ in range(plan.relax):  # particles on top of each other would never be moved
        _, grad = evaluator.value_and_grad(x)
        x = x - step * clip_rows(grad, 1.0, each_particle=x.ndim > 2)
    found = parallel_tempering(
        evaluator,
        x,
        plan.ladder,
        plan.steps,
        generator,
        burn_in=plan.burn_in,
        thin=max(1, plan.steps * plan.chains // samples),
        step=problem.finest**2,
        geometry=problem.geometry,
    )
    spent = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
        "energy_calls": evaluator.calls,
        "energy_evaluations": evaluator.evaluations,
        "network_evaluations": 0,
        "gradient_steps": 0,
        "acceptance": float(found.acceptance[0]),
        "lowest_swap": float(found.swaps.min()),
    }
    x = found.samples.flatten(0, 1)
    x = x[torch.randperm(len(x), generator=generator)[:samples]]
    return x, problem.energy(x).detach(), spent
