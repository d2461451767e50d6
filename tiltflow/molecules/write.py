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

COLUMNS = ("name", "smiles", "conformer", "energy", "energy_unit", "weight", "cluster", "population", "temperature")
Clustered = tuple[Ensemble, Clusters]


def write_conformers(folder: Path, found: Sequence[Clustered]) -> None:
    """``conformers.sdf`` and ``conformers.csv``, in the same order.

    Properties of an SD record are those of :meth:`~tiltflow.molecules.ensemble.Ensemble.records` and the provenance.
    """
    rows = [ensemble.records(clusters) for ensemble, clusters in found]
    parts = [
        (e.molecule, e.positions, [{**e.provenance, **row} for row in records]) for (e, _), records in zip(found, rows)
    ]
    write_sdf(folder / "conformers.sdf", parts)
    text = _csv(COLUMNS, ([row[c] for c in COLUMNS] for records in rows for row in records))
    write_text(folder / "conformers.csv", text)


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """``rejects.csv``: inputs that were refused, and conformers with a fault; only its header if there are none."""
    write_text(folder / "rejects.csv", _csv(Reject._fields, rejects))


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
