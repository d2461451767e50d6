"""Make the reference samples of LJ55.

``python benchmarks/lj55_reference.py --samples-out tiltflow/energies/assets/lj55_reference.safetensors``

E = 2 Σ_{i<j} [r⁻¹² − 2r⁻⁶] + ½ Σ_i ‖x_i − x̄‖², the centre of mass at zero: at T = 1 a compressed liquid drop. Two
independent runs of parallel tempering, one from the relaxed icosahedron and one from relaxed random points. The samples are
written only if

* the virial identity E[x·∇E] = 3(N − 1) holds within 3 standard errors, and these are below 2 % of it;
* the mean energies of the two runs agree within 3 standard errors;
* the energy W2 between the runs is no larger than 99 % of those between random halves of the chains.

Standard errors are those of the chains' means. ``--particles 13`` makes the known set of LJ13 instead: mean energy −43.13.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.bench.result import publish
from tiltflow.core.geometry import Centred
from tiltflow.energies.mcmc import Tempered, parallel_tempering
from tiltflow.energies.particles import LennardJones
from tiltflow.metrics.sampling import energy_w2

STARTS = ("icosahedron", "random")


@cache
def _workspace(batch: int, particles: int) -> Tensor:
    """Three arrays of pairs, kept: to have new ones from the system at every call doubles the time of a step."""
    return torch.empty(3, batch, particles, particles, dtype=torch.float64)


class _LennardJones(torch.autograd.Function):
    """The package's energy with its gradient by hand, from the Gram matrix: in double precision five times as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse, s, slope = _workspace(*x.shape[:2])
        square, centred = x.square().sum(-1), x - x.mean(1, keepdim=True)
        torch.add(square[:, :, None], square[:, None, :], out=inverse).baddbmm_(x, x.transpose(1, 2), alpha=-2)
        inverse.diagonal(dim1=1, dim2=2).fill_(1e30)
        inverse.reciprocal_()  # 1/r²
        torch.mul(inverse, inverse, out=s).mul_(inverse)
        torch.addcmul(s, s, s, value=-1, out=slope)  # s − s²
        value = 0.5 * centred.square().sum((1, 2)) - slope.sum((1, 2)) - s.sum((1, 2))
        slope.mul_(inverse).mul_(24)
        ctx.save_for_backward(x * slope.sum(2, keepdim=True) - slope @ x + centred)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * grad_outputs[0][:, None, None]


def energy(x: Tensor) -> Tensor:
    """x (B, N, 3) -> (B,)."""
    return _LennardJones.apply(x)


def gradient(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x)[0]


def check_energy(x: Tensor) -> None:
    """That this is the package's energy, and its gradient."""
    y = x.detach().requires_grad_()
    value = LennardJones()(y)
    torch.testing.assert_close(energy(x), value)
    torch.testing.assert_close(gradient(x), torch.autograd.grad(value.sum(), y)[0])


def icosahedron(particles: int) -> Tensor:
    """The closed shells of Mackay 1962, nearest neighbours at about 1: 13 or 55 points."""
    golden = (1 + 5**0.5) / 2
    signs = [(a, b) for a in (1.0, -1.0) for b in (golden, -golden)]
    corners = torch.tensor([p for a, b in signs for p in [(0, a, b), (a, b, 0), (b, 0, a)]], dtype=torch.float64) / 2
    shells = [torch.zeros(1, 3, dtype=torch.float64), corners]
    if particles == 55:
        i, j = torch.triu_indices(12, 12, 1)
        edge = (corners[i] - corners[j]).norm(dim=1) < 1.1
        shells += [2 * corners, (corners[i] + corners[j])[edge]]
    return torch.cat(shells)


def start_points(start: str, particles: int, chains: int, generator: torch.Generator) -> Tensor:
    """Relaxed by clipped gradient descent: (chains, N, 3)."""
    if start == "icosahedron":
        x = icosahedron(particles).repeat(chains, 1, 1)
    else:
        x = 0.3 * particles ** (1 / 3) * torch.randn(chains, particles, 3, generator=generator, dtype=torch.float64)
    for _ in range(1500):
        g = gradient(x)
        x = x - 1e-3 * g * (30 / g.norm(dim=-1, keepdim=True).clamp_min(30))
    return Centred().wrap(x)


def run(start: str, arguments: argparse.Namespace, seed: int) -> Tempered:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    x0 = start_points(start, arguments.particles, arguments.chains, generator)
    check_energy(x0)
    plan = {"burn_in": arguments.burn_in, "thin": arguments.thin, "step": 1e-4, "geometry": Centred()}
    return parallel_tempering(energy, x0, arguments.temperatures, arguments.steps, generator, **plan)


def chain_mean(values: Tensor) -> tuple[float, float]:
    """Mean of values (S, C) and its standard error over the C independent chains."""
    means = values.mean(0)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def virial(samples: Tensor) -> Tensor:
    """x·∇E of samples (S, C, N, 3): (S, C)."""
    rows = [(x * gradient(x)).sum((1, 2)) for x in samples.flatten(0, 1).split(512)]
    return torch.cat(rows).view(samples.shape[:2])


def correlation_time(values: Tensor, thin: int) -> float:
    """Integrated autocorrelation time of values (S, C), in steps, summed until the correlation falls below .05."""
    centred, total, lag = values - values.mean(), 0.5, 1
    while lag < len(values) // 2:
        rho = float((centred[lag:] * centred[:-lag]).mean() / centred.square().mean())
        if rho < 0.05:
            break
        total, lag = total + rho, lag + 1
    return 2 * total * thin


def agreement(energies: Tensor, draws: int, generator: torch.Generator) -> dict[str, float]:
    """energies (S, 2C), the first C chains of one run: W2 between the runs, and its share among random halves of chains."""
    half = energies.shape[1] // 2
    observed = energy_w2(energies[:, :half].flatten(), energies[:, half:].flatten())
    shuffled = []
    for _ in range(draws):
        order = torch.randperm(2 * half, generator=generator)
        shuffled.append(energy_w2(energies[:, order[:half]].flatten(), energies[:, order[half:]].flatten()))
    random = torch.tensor(shuffled)
    return {"w2": observed, "w2_random_halves": float(random.mean()), "p": float((random >= observed).double().mean())}


def judge(runs: list[Tempered], particles: int, thin: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    freedom, rows = 3 * (particles - 1), []
    for start, one in zip(STARTS, runs):
        mean, error = chain_mean(one.energies[:, 0])
        pressure, pressure_error = chain_mean(virial(one.samples))
        rows.append(
            {"start": start, "mean_energy": mean, "mean_energy_error": error, "virial": pressure}
            | {"virial_error": pressure_error, "correlation_steps": correlation_time(one.energies[:, 0], thin)}
            | {"energy_by_temperature": one.energies.mean((0, 2)).tolist(), "acceptance": one.acceptance.tolist()}
            | {"energy_variance": one.energies.var((0, 2)).tolist(), "swaps": one.swaps.tolist(), "step": one.step.tolist()}
            | {"evaluations": one.evaluations, "seconds": one.seconds}
        )
    energies = torch.cat([one.energies[:, 0] for one in runs], 1)
    pooled, pooled_error = chain_mean(torch.cat([virial(one.samples) for one in runs], 1))
    apart = abs(rows[0]["mean_energy"] - rows[1]["mean_energy"])
    allowed = 3 * (rows[0]["mean_energy_error"] ** 2 + rows[1]["mean_energy_error"] ** 2) ** 0.5
    halves = agreement(energies[:: max(1, len(energies) // 1000)], 300, torch.Generator().manual_seed(0))
    mean, error = chain_mean(energies)
    verdict = {
        "virial_expected": freedom,
        "virial": pooled,
        "virial_error": pooled_error,
        "virial_holds": abs(pooled - freedom) < 3 * pooled_error < 0.06 * freedom,
        "mean_energy": mean,
        "mean_energy_error": error,
        "means_apart": apart,
        "means_agree": apart < allowed,
        "halves": halves,
        "halves_agree": halves["p"] >= 0.01,
    }
    verdict["holds"] = verdict["virial_holds"] and verdict["means_agree"] and verdict["halves_agree"]
    return rows, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, choices=(13, 55), default=55)
    parser.add_argument("--chains", type=int, default=8, help="per start")
    parser.add_argument("--burn-in", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--thin", type=int, default=50)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.09, 1.19, 1.3])
    parser.add_argument("--keep", type=int, default=3200, help="samples written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--samples-out", type=Path)
    parser.add_argument("--out", type=Path, help="the JSON document")
    arguments, started = parser.parse_args(), time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run, start, arguments, 2 * arguments.seed + k) for k, start in enumerate(STARTS)]
        runs = [job.result() for job in jobs]
    rows, verdict = judge(runs, arguments.particles, arguments.thin)
    all_samples = torch.cat([one.samples for one in runs], 1)  # (S, 2C, N, 3), evenly thinned below
    pick = torch.linspace(0, len(all_samples) - 1, arguments.keep // all_samples.shape[1]).round().long()
    kept = all_samples[pick].flatten(0, 1).float()
    verdict["written"] = bool(verdict["holds"] and arguments.samples_out is not None)
    verdict |= {"samples": len(kept), "mean_energy_of_samples": float(energy(kept.double()).mean())}
    if verdict["written"]:
        part = arguments.samples_out.with_name(arguments.samples_out.name + ".part")
        save_file({"samples": kept.contiguous()}, part)
        os.replace(part, arguments.samples_out)
    publish(rows, arguments.seed, arguments.out, started, verdict)


if __name__ == "__main__":
    main()
