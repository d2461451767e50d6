"""Make the reference samples of DW4, and hold the published ones against them.

``python benchmarks/dw4_reference.py --samples-out tiltflow/energies/assets/dw4_reference.safetensors``

Two runs of parallel tempering with seeds of their own. The samples are written only if the virial identity E[x·∇E] = 6 holds
within 3 standard errors of the chains' means, the mean energies of the runs agree within 3 of theirs, and the energy W2
between the runs is no larger than 99 % of those between random halves of the chains. ``--compare FILE.npy`` (N, 8) adds what
another set of samples makes of the same statistics.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lj55_reference import agreement, chain_mean
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.bench.result import publish
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.energies.mcmc import Tempered, parallel_tempering
from tiltflow.metrics.particles import interatomic_distances
from tiltflow.metrics.sampling import energy_w2
from tiltflow.sampling.job import base_draws

PROBLEM = ENERGY_PROBLEMS["dw4"]()
TEMPERATURES = [1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0]


def run(chains: int, steps: int, seed: int) -> Tempered:
    generator = torch.Generator().manual_seed(seed)
    x0 = base_draws(PROBLEM, chains, generator).double()
    plan: dict[str, Any] = {"burn_in": steps // 4, "thin": 20, "step": 0.01, "geometry": PROBLEM.geometry}
    return parallel_tempering(PROBLEM.energy, x0, TEMPERATURES, steps, generator, **plan)


def short(x: Tensor) -> Tensor:
    """Share of distances below 4, the top of the barrier, per sample (n,)."""
    return (interatomic_distances(x).view(len(x), -1) < 4).double().mean(1)


def virials(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return (x * torch.autograd.grad(PROBLEM.energy(x).sum(), x)[0]).sum((1, 2)).detach()


def row(name: str, samples: Tensor) -> dict[str, Any]:
    """Statistics of samples (S, C, 4, 2) with errors over the C chains."""
    flat, shape = samples.flatten(0, 1), samples.shape[:2]
    found: dict[str, Any] = {"samples": name}
    for key, values in (("energy", PROBLEM.energy(flat)), ("virial", virials(flat)), ("short_distances", short(flat))):
        found[key], found[f"{key}_error"] = chain_mean(values.view(shape))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=100, help="per run")
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--keep", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, help="another set, .npy")
    parser.add_argument("--samples-out", type=Path)
    parser.add_argument("--out", type=Path, help="the JSON document")
    arguments, started = parser.parse_args(), time.perf_counter()
    runs = [run(arguments.chains, arguments.steps, 2 * arguments.seed + k) for k in (0, 1)]
    samples = torch.cat([one.samples for one in runs], 1)
    rows = [row("run 1", runs[0].samples), row("run 2", runs[1].samples), row("both", samples)]
    energies = PROBLEM.energy(samples.flatten(0, 1)).view(samples.shape[:2])
    halves = agreement(energies[:: max(1, len(energies) // 200)], 300, torch.Generator().manual_seed(0))
    apart = abs(rows[0]["energy"] - rows[1]["energy"])
    holds = (
        abs(rows[2]["virial"] - 6) < 3 * rows[2]["virial_error"]
        and apart < 3 * (rows[0]["energy_error"] ** 2 + rows[1]["energy_error"] ** 2) ** 0.5
        and halves["p"] >= 0.01
    )
    if arguments.compare is not None:
        loaded = torch.from_numpy(np.load(arguments.compare, allow_pickle=False))
        other = PROBLEM.geometry.wrap(loaded.double().view(-1, 4, 2))
        w2 = energy_w2(PROBLEM.energy(other), energies.flatten())
        rows.append(row(arguments.compare.name, other[:, None].transpose(0, 1)) | {"energy_w2_to_both": w2})
    pick = torch.linspace(0, len(samples) - 1, -(-arguments.keep // samples.shape[1])).round().long()
    kept = samples[pick].flatten(0, 1)[: arguments.keep].float().contiguous()
    if holds and arguments.samples_out is not None:
        part = arguments.samples_out.with_name(arguments.samples_out.name + ".part")
        save_file({"samples": kept}, part)
        os.replace(part, arguments.samples_out)
    publish(rows, arguments.seed, arguments.out, started, None, halves=halves, holds=holds, kept=len(kept))


if __name__ == "__main__":
    main()
