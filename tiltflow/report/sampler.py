"""The page of a sampler's run: verdict, samples beside the reference, energies, distances, path weights, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.weights import normalised
from tiltflow.metrics.particles import interatomic_distances
from tiltflow.report import plots
from tiltflow.report.html import curves, data_uri, inlined, render_template, write_page
from tiltflow.verdict.line import Line, Status

SHOWN = 5_000
CURVES = (  # history key, heading, ordinate, logarithmic, caption
    ("energy", "Energy", "median E (kT)", False, "Of the end points of each round; dashed: of the reference."),
    ("ess", "Path weights", "ESS fraction", False, "Effective sample size of each round's path weights, of 1."),
    ("log_z", "log Z", "log Z", False, "From each round's path weights; dashed: exact."),
    ("reward", "Objective", "−E[g]", False, "g = E + log p_base of the end points."),
    ("kl", "KL to the base", "KL (nats)", False, "E[∫ ½‖u‖² dt] over the sampled paths."),
    ("temperature", "Temperature", "T", False, "Of the target of each round."),
    ("loss", "Loss", "matching loss", True, "Its floor is the variance of the target, not zero."),
    ("grad_norm", "Gradient norm", "gradient norm", True, "Before clipping."),
)
NUMBERS = (  # row key, name, key of the floor or the exact value
    ("w2", "W2", "w2_floor"),
    ("energy_w2", "W2 of energies (kT)", "energy_w2_floor"),
    ("distance_w2", "W2 of distances of particles", "distance_w2_floor"),
    ("mode_tv", "mode weights, total variation", None),
    ("modes_covered", "modes with a sample", "modes"),
    ("log_z", "log Z from the sampler's paths", "log_z_exact"),
    ("log_z_forward", "log Z backwards from the reference", "log_z_exact"),
    ("elbo", "E[log w] ≤ log Z", None),
    ("eubo", "E*[log w] ≥ log Z, from the reference", None),
    ("ess", "path weights ESS, of 1", None),
    ("forward_ess", "path weights ESS from the reference, of 1", None),
    ("virial", "E[x·∇E]", "dimension"),
    ("rejected", "samples without a finite energy", None),
)


class SampledRow(NamedTuple):
    """One number of the sampler, its floor or exact value, and the same after resampling by path weights."""

    name: str
    value: float | None
    floor: float | None
    resampled: float | None


@dataclass(frozen=True)
class SamplerRecord:
    """Everything the report of one sampler shows.

    Args:
        title, command, status, verdict, history, config, notes, version: as in :class:`~tiltflow.report.RunRecord`.
        row: the numbers of :func:`tiltflow.sampling.assess.assess` and its companions.
        samples, energy, log_weights: drawn, (N, *event), (N,), (N,) or None.
        reference, reference_energy: (M, *event), (M,), or None.
        particles: samples are (N, n, m), compared by their distances. log_z: exact, or None.
    """

    title: str
    command: str
    status: Status
    verdict: Sequence[Line]
    row: Mapping[str, Any]
    samples: Tensor
    energy: Tensor
    log_weights: Tensor | None = None
    reference: Tensor | None = None
    reference_energy: Tensor | None = None
    particles: bool = False
    log_z: float | None = None
    history: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    version: str = ""

    @property
    def path_ess(self) -> float | None:
        """Of the page's head."""
        return self.row.get("ess")


def write_sampler_report(folder: Path, record: SamplerRecord) -> Path:
    """Write ``folder/report.html`` for a sampler, atomically, and return its path. Raises as ``write_report`` does."""
    return write_page(folder, lambda: render_sampler(record))


def render_sampler(record: SamplerRecord) -> str:
    """The page as a string."""
    galleries, projection = _projections(record)
    reference_energy = None if record.reference_energy is None else float(record.reference_energy.median())
    levels = {"energy": {"reference": reference_energy}, "log_z": {"reference": record.log_z}}
    return render_template(
        "sampler.html.j2",
        record,
        galleries=galleries,
        projection=projection,
        laws=inlined(_laws(record)),
        figures=inlined(curves(record.history, CURVES, levels)),
        summary=summary(record.row, record.log_z),
    )


def summary(row: Mapping[str, Any], log_z: float | None) -> list[SampledRow]:
    """The table of numbers, without what is not known."""
    exact = {**row, "log_z_exact": log_z}
    return [
        SampledRow(name, row[key], exact.get(floor) if floor else None, row.get(f"{key}_resampled"))
        for key, name, floor in NUMBERS
        if row.get(key) is not None
    ]


def project(samples: Sequence[Tensor], particles: bool) -> tuple[list[Tensor], str]:
    """Every set of samples in the same two coordinates, and what they are: of the last set, if they are principal axes."""
    rows = [x.detach().double() for x in samples]
    text = "The two coordinates."
    if particles:
        count, (n, m) = [len(x) for x in rows], rows[0].shape[1:]
        rows = [interatomic_distances(x).reshape(c, -1).sort(1).values for x, c in zip(rows, count)]
        text = f"The first two principal axes of the sorted distances of {n} particles in {m}-D."
    elif rows[0][0].numel() == 2:
        return [x.flatten(1) for x in rows], text
    rows = [x.flatten(1) for x in rows]
    if rows[0].shape[1] == 1:
        return [torch.cat([x, torch.zeros_like(x)], 1) for x in rows], "The only coordinate."
    centre = rows[-1].mean(0)
    axes = torch.linalg.eigh((rows[-1] - centre).T.cov()).eigenvectors[:, -2:].flip(1)
    return [(x - centre) @ axes for x in rows], text if particles else "The first two principal axes."


def _projections(record: SamplerRecord) -> tuple[list[dict[str, str]], str]:
    sets = {"Samples": (record.samples, plots.AFTER), "Reference": (record.reference, plots.REFERENCE)}
    given = {k: (x[torch.isfinite(x).flatten(1).all(1)][:SHOWN], c) for k, (x, c) in sets.items() if x is not None}
    given = {k: (x, c) for k, (x, c) in given.items() if len(x)}
    if not given:
        return [], "No sample is finite."
    points, text = project([x for x, _ in given.values()], record.particles)
    limits = plots.limits2d(*points)
    galleries = [
        {"name": name, "src": data_uri(plots.scatter2d(p, limits, color))}
        for (name, (_, color)), p in zip(given.items(), points, strict=True)
    ]
    return galleries, text


def _laws(record: SamplerRecord) -> list[tuple[str, str, bytes]]:
    energies = {"samples": record.energy}
    if record.reference_energy is not None:
        energies["reference"] = record.reference_energy
    found = [("Energies", "The most sensitive single number of a configuration.", plots.histogram(energies, "E (kT)"))]
    if record.particles:
        pairs = {"samples": interatomic_distances(record.samples[:SHOWN])}
        if record.reference is not None:
            pairs["reference"] = interatomic_distances(record.reference[:SHOWN])
        found.append(("Distances of particles", "Of all pairs.", plots.histogram(pairs, "distance")))
    if record.log_weights is not None:
        n = len(record.log_weights)
        weight = (normalised(record.log_weights) * n).sort(descending=True).values[:: max(1, n // 1000)].tolist()
        rank = [i / len(weight) for i in range(len(weight))]
        picture = plots.curve(rank, {"weight": weight}, "share of the samples", "path weight (mean 1)", {"ideal": 1.0}, True)
        found.append(("Sorted path weights", "Flat at 1 if the paths are the target's.", picture))
    return found
