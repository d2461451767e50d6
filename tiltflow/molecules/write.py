"""The three files of a run: conformers.sdf, conformers.csv and rejects.csv, each written in one step."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rdkit import Chem

from tiltflow.molecules.clusters import Clusters
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.molecule import with_positions
from tiltflow.molecules.read import Reject
from tiltflow.train.store import write_text

UNKNOWN, NO_WEIGHT = "cannot tell", "none"
"""In place of the weights of an unreliable ensemble; and of conformers that were chosen, not drawn."""
COLUMNS = ("name", "smiles", "conformer", "energy", "energy_unit", "weight", "cluster", "temperature")
Clustered = tuple[Ensemble, Clusters]


def write_conformers(folder: Path, found: Sequence[Clustered]) -> None:
    """``conformers.sdf`` and ``conformers.csv``, in the same order.

    Properties of a record: ``smiles``, ``conformer`` (from 1), ``energy`` and ``energy_unit``, ``weight`` at ``temperature``
    (those of a molecule sum to 1; "cannot tell" if they are unreliable, "none" if there are none), ``cluster`` (from 1, the
    most populated first), and the ensemble's provenance.
    """
    target = folder / "conformers.sdf"
    part = target.with_name(target.name + ".part")
    writer = Chem.SDWriter(str(part))
    try:
        for ensemble, clusters in found:
            mol = with_positions(ensemble.molecule.mol, ensemble.positions)
            mol.SetProp("_Name", ensemble.molecule.name)
            for i, row in enumerate(_rows(ensemble, clusters)):
                for key, value in {**ensemble.provenance, **row}.items():
                    if key != "name":
                        mol.SetProp(key, value)
                writer.write(mol, confId=i)
    finally:
        writer.close()
    os.replace(part, target)
    rows = (row for ensemble, clusters in found for row in _rows(ensemble, clusters))
    write_text(folder / "conformers.csv", _csv(COLUMNS, ([row[c] for c in COLUMNS] for row in rows)))


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """``rejects.csv``: inputs that were refused, and conformers with a fault; only its header if there are none."""
    write_text(folder / "rejects.csv", _csv(Reject._fields, rejects))


def weight_texts(ensemble: Ensemble) -> list[str]:
    """Of each conformer: its weight, "cannot tell" or "none"."""
    if ensemble.log_weights is None:
        return [NO_WEIGHT] * len(ensemble)
    return [repr(w) for w in ensemble.weights.tolist()] if ensemble.reliable else [UNKNOWN] * len(ensemble)


def _rows(ensemble: Ensemble, clusters: Clusters) -> list[dict[str, str]]:
    numbers = zip(ensemble.energy.double().tolist(), weight_texts(ensemble), clusters.labels.tolist())
    return [
        {
            "name": ensemble.molecule.name,
            "smiles": ensemble.molecule.smiles,
            "conformer": str(i),
            "energy": repr(energy),
            "energy_unit": ensemble.unit,
            "weight": weight,
            "cluster": str(cluster + 1),
            "temperature": NO_WEIGHT if ensemble.log_weights is None else f"{ensemble.temperature:g} K",
        }
        for i, (energy, weight, cluster) in enumerate(numbers, 1)
    ]


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
