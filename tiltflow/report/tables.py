"""The tables of a page: what was reached beside the base and the reference; the numbers of a sampler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tiltflow.report.page import Table

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


def scores_table(scores: Iterable[tuple[str, float | None, float | None, float | None]]) -> Table:
    """What changed: rows (name, of the base, of the reference, reached), each number possibly None."""
    rows = [(name, base, reached, reference) for name, base, reference, reached in scores]
    return Table("What changed", ("", "before", "after", "reference"), rows)


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
