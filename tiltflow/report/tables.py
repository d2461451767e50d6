"""The tables of a page: what was reached beside the base and the reference; the numbers of a sampler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tiltflow.report.page import Table
from tiltflow.verdict.line import Score

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


class SamplerNumber(NamedTuple):
    """One number of a sampler, its floor or exact value, and the same after resampling by path weights."""

    name: str
    value: float | None
    floor: float | None
    resampled: float | None


def scores_table(scores: Iterable[Score]) -> Table:
    """What changed: a row for each score, with the ways of sampling that were judged."""
    listed = list(scores)
    names = {"base": "before", "reached": "after", "ode": "by ODE", "exact": "exact", "reference": "reference"}
    shown = [p for p in names if p in ("base", "reached", "reference") or any(getattr(s, p) is not None for s in listed)]
    rows = [(s.name, *(getattr(s, part) for part in shown)) for s in listed]
    return Table("What changed", ("", *(names[part] for part in shown)), rows)


def ways_table(ways: Iterable[Mapping[str, Any]]) -> Table:
    """Each way of sampling with its answer and the command that gives those samples."""
    rows = [(way["name"], way["status"], way["command"]) for way in ways]
    return Table("Ways of sampling", ("", "answer", "command"), rows, "The verdict is that of the best way.")


def sampler_numbers(row: Mapping[str, Any], log_z: float | None) -> list[SamplerNumber]:
    """The numbers that ``row`` has, of those of :func:`tiltflow.sampling.assess.assess` and its companions."""
    exact = {**row, "log_z_exact": log_z}
    return [
        SamplerNumber(name, row[key], exact.get(floor) if floor else None, row.get(f"{key}_resampled"))
        for key, name, floor in NUMBERS
        if row.get(key) is not None
    ]


def sampler_table(row: Mapping[str, Any], log_z: float | None) -> Table:
    """The numbers of :func:`sampler_numbers`, with what a floor is."""
    caption = (
        "A floor is the same distance between two reference sets of the same size. Resampled: after drawing again by path "
        "weights."
    )
    return Table("Numbers", ("", "value", "floor or exact", "resampled"), sampler_numbers(row, log_z), caption)
