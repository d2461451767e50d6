"""The three files of a run: conformers.sdf, conformers.csv and rejects.csv, each written in one step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tiltflow.molecules.clusters import Clusters
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.read import Reject
from tiltflow.molecules.sdf import write_sdf
from tiltflow.train.store import write_text

COLUMNS = (
    "name", "smiles", "conformer", "energy", "relative_energy", "energy_unit", "weight", "cluster", "population",
    "temperature",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")
Clustered = tuple[Ensemble, Clusters]


def write_conformers(folder: Path, found: Sequence[Clustered]) -> None:
    """``conformers.sdf`` and ``conformers.csv``, in the same order.

    Properties of an SD record are those of :meth:`~tiltflow.molecules.ensemble.Ensemble.properties`.
    """
    write_sdf(folder / "conformers.sdf", [(e.molecule, e.positions, e.properties(clusters)) for e, clusters in found])
    rows = (row for ensemble, clusters in found for row in ensemble.records(clusters))
    write_text(folder / "conformers.csv", _csv(COLUMNS, ([row[c] for c in COLUMNS] for row in rows)))


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """``rejects.csv``: inputs that were refused, and conformers with a fault; only its header if there are none."""
    write_text(folder / "rejects.csv", _csv(Reject._fields, rejects))


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue()


def _inert(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    if not isinstance(cell, str) or not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
