"""What samples are held against, region by region: a reference, or an independent classical run of the same energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus
from tiltflow.energies import Energy, EnergyProblem, Evaluator
from tiltflow.energies.annealing import anneal
from tiltflow.energies.exchange import Exchanged, exchange, path
from tiltflow.metrics.regions import Apart, Sample, apart
from tiltflow.sampling.drawn import Drawn

ISLANDS, PARTICLES, CHAINS, MOVES, LEAST, MOST = 32, 64, 4, 5, 20, 150
"""Of the classical run: populations, draws and chains of each, moves between exchanges, states of a chain that are kept."""
COLUMNS, RANKS = 50, 8
"""Features at most, beside energy and radius; of them ranks of the sorted distances of identical particles."""


def classical(
    problem: EnergyProblem, energy: Energy, budget: int, generator: torch.Generator
) -> tuple[Exchanged | None, str]:
    """An independent run of annealing and exchange of replicas, and what the report should say of it.

    Args:
        problem: What was sampled.
        energy: Its energy.
        budget: Rows at most that it may be asked for; 0: no run.
        generator: Of every draw.

    Returns:
        The run; None if it came to nothing.
    """
    if not budget:
        return None, "There was no independent classical run."
    asked = Evaluator(energy, budget=budget)
    try:
        start = anneal(problem, asked, ISLANDS, PARTICLES, MOVES, generator, keep=CHAINS)
        each = 2 * ISLANDS * CHAINS * (1 + len(path(start)) * (MOVES + 2))
        rounds = min(MOST, (budget - asked.evaluations) // each)
        if rounds < LEAST:
            raise TiltflowError(f"{budget} energies do not suffice: {asked.evaluations + LEAST * each} would.")
        found = exchange(problem, asked, start, rounds, MOVES, generator)
    except TiltflowError as error:
        return None, f"No independent classical run: {error}"
    size = f"{ISLANDS * CHAINS} chains of {found.rungs} rungs, {rounds} states of each, {asked.evaluations} energies"
    log_z = f"log Z = {found.log_z[0]:.4g} ± {found.log_z[1]:.2g}"
    return found, f"An independent classical run ({size}) says {log_z}; its worst pair exchanges {found.swaps:.0%}."


def beside_classical(problem: EnergyProblem, drawn: Drawn, found: Exchanged) -> dict[str, Any]:
    """Row entries "classical_…": samples beside a run, and the run's later half beside its earlier one."""
    half = len(found.x) // 2
    every, late, early = (_some(found, part) for part in (slice(None), slice(half, None), slice(half)))
    return _entries("classical", compare(problem, drawn, every)) | {
        "classical_log_z": found.log_z[0],
        "classical_log_z_std": found.log_z[1],
        "classical_drift": compare(problem, late, early).score,
    }


def _some(found: Exchanged, part: slice) -> Drawn:
    return Drawn(found.x[part], found.energy[part], None, found.islands[part])


def beside_reference(problem: EnergyProblem, drawn: Drawn, reference: Tensor) -> dict[str, Any]:
    """Row entries "reference_…" from exact samples."""
    return _entries("reference", compare(problem, drawn, Drawn(reference, Evaluator(problem.energy).value(reference), None)))


def _entries(tag: str, found: Apart) -> dict[str, Any]:
    return {f"{tag}_{name}": value for name, value in found._asdict().items()}


def compare(problem: EnergyProblem, x: Drawn, y: Drawn) -> Apart:
    """The regions of the features of x and y, rows with a finite energy only."""
    centre = y.x.flatten(1).median(0).values
    sets, names = [], list[str]()
    for s in (x, y):
        finite = s.energy.isfinite()
        names, columns = _features(problem, s.x[finite], centre)
        groups = None if s.groups is None else s.groups[finite.cpu()]
        sets.append(Sample(torch.cat([double(s.energy[finite])[:, None], columns], 1), groups))
    return apart(sets[0], sets[1], ["E", *names], torch.Generator().manual_seed(0))


def _features(problem: EnergyProblem, x: Tensor, centre: Tensor) -> tuple[list[str], Tensor]:
    """Names, and (n, F) numbers that say where x (n, *event) is, as the energy sees it."""
    flat = double(x.flatten(1))
    if isinstance(problem.geometry, Torus):
        return _reduced(["cos x", "sin x"], torch.stack([flat.cos(), flat.sin()]))
    if isinstance(problem.geometry, Centred):
        pairs = torch.combinations(torch.arange(x.shape[1]), 2)
        length = (double(x)[:, pairs[:, 0]] - double(x)[:, pairs[:, 1]]).norm(dim=-1)
        if not problem.identical:
            return _reduced(["distance"], length[None])
        ranks = torch.linspace(0, length.shape[1] - 1, min(RANKS, length.shape[1])).long()
        return [f"distance of rank {i}" for i in ranks.tolist()], length.sort(1).values[:, ranks]
    names, columns = _reduced(["x"], flat[None])
    return ["radius", *names], torch.cat([(flat - double(centre)).norm(dim=1, keepdim=True), columns], 1)


def _reduced(words: list[str], columns: Tensor) -> tuple[list[str], Tensor]:
    """All columns of (K, n, d), or so many random directions."""
    kinds, rows, d = columns.shape
    names = [f"{word}[{i}]" for word in words for i in range(d)]
    flat = columns.permute(1, 0, 2).reshape(rows, kinds * d)
    if kinds * d <= COLUMNS:
        return names, flat
    turn = torch.randn(kinds * d, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    return [f"direction {i}" for i in range(COLUMNS)], flat @ torch.linalg.qr(turn)[0]
