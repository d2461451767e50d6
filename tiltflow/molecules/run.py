"""A run over molecules: generate, audit, cluster, write. What was generated is kept, so that a run can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tiltflow._version import __version__
from tiltflow.molecules.audit import audit
from tiltflow.molecules.clusters import Clusters, clusters
from tiltflow.molecules.covering import covering_ensemble
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.generate import ConformerSettings, generate
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.page import conformers_page
from tiltflow.molecules.read import Read, Reject
from tiltflow.molecules.write import Clustered, write_conformers, write_rejects
from tiltflow.report import write_page
from tiltflow.run.folder import RunFolder
from tiltflow.train.store import load_state, save_state

Progress = Callable[[str, int, int, str], None]


def run_conformers(
    read: Read,
    settings: ConformerSettings,
    seed: int,
    folder: RunFolder,
    command: str,
    progress: Progress,
    cover: bool = False,
) -> list[dict[str, Any]]:
    """Ensembles of all molecules, in ``folder``: conformers.sdf, conformers.csv, rejects.csv, report.html.

    ``cover`` asks for conformers that cover the minima instead (:mod:`tiltflow.molecules.covering`), which has a recipe of
    its own: of the settings only n and ``model`` count.

    Molecule i has seed ``seed + i``. A conformer with a fault (:func:`~tiltflow.molecules.audit.audit`), or without a finite
    energy or a weight, is left out and named in rejects.csv. Molecules that the folder has finished are not generated again.

    Returns:
        One row per molecule, then one per refused input ("kind": "conformers" or "refused").
    """
    found: list[Clustered] = []
    refused, faulty, rows = list(read.rejects), list[Reject](), list[dict[str, Any]]()
    paths = [folder.path / f"molecule-{i:05}.safetensors" for i in range(len(read.molecules))]
    todo = [(i, path, m) for i, (path, m) in enumerate(zip(paths, read.molecules)) if not path.is_file()]
    missing = [(path, m, settings, seed + i, cover) for i, path, m in todo]
    _generate_all(missing, progress)
    for path, molecule, line in zip(paths, read.molecules, read.lines):
        state = load_state(path)
        if "refused" in state:
            refused.append(Reject(line, molecule.name, molecule.smiles, state["refused"]))
            continue
        ensemble = _ensemble(molecule, state)
        faults = _faults(ensemble)
        faulty += [
            Reject(line, molecule.name, molecule.smiles, f"conformer {j} left out: {fault}")
            for j, fault in enumerate(faults, 1)
            if fault is not None
        ]
        kept = ensemble.keep(torch.tensor([fault is None for fault in faults], dtype=torch.bool))
        found.append((kept, clusters(kept)))
        rows.append(_row(*found[-1], state["seconds"]))
    rejects = sorted(refused + faulty, key=lambda r: r.line)
    write_conformers(folder.path, found)
    write_rejects(folder.path, rejects)
    config = {**asdict(settings), "cover": cover, "seed": seed}
    write_page(folder.path, conformers_page(found, rejects, command, config, __version__))
    return rows + [{"kind": "refused", **r._asdict()} for r in refused]


def _generate_all(jobs: list[tuple[Path, Molecule, ConformerSettings, int, bool]], progress: Progress) -> None:
    """One process per core and molecule; a lone molecule, or a lone core, stays in this process and shows more."""
    workers = min(len(jobs), torch.get_num_threads())
    if workers <= 1:
        for k, job in enumerate(jobs, 1):
            _keep(*job, partial(progress, f"{k}/{len(jobs)} {job[1].name}"))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(_keep, *job): job[1].name for job in jobs}
        for done, future in enumerate(as_completed(running), 1):
            future.result()
            progress("molecules", done, len(jobs), running[future])


def _keep(
    path: Path,
    molecule: Molecule,
    settings: ConformerSettings,
    seed: int,
    cover: bool,
    progress: Callable[[int, int, str], None] = lambda done, total, said: None,
) -> None:
    save_state(path, _generated(molecule, settings, seed, cover, progress))


def _generated(
    molecule: Molecule, settings: ConformerSettings, seed: int, cover: bool, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    from tiltflow.molecules.energies import UnsupportedMolecule

    started = time.perf_counter()
    try:
        make = covering_ensemble if cover else generate
        e = make(molecule, settings, seed, progress)
    except UnsupportedMolecule as error:
        return {"refused": error.reason}
    said = {"tiltflow_version": __version__, "energy_model": settings.energy, "seed": str(seed)}
    return {
        "positions": e.positions,
        "energy": e.energy,
        "unit": e.unit,
        "log_weights": e.log_weights,
        "temperature": e.temperature,
        "sampling_temperature": e.sampling_temperature,
        "provenance": {**said, "sampling_temperature": f"{e.sampling_temperature:g} K", **e.provenance},
        "seconds": time.perf_counter() - started,
    }


def _ensemble(molecule: Molecule, state: dict[str, Any]) -> Ensemble:
    return Ensemble(molecule, **{key: value for key, value in state.items() if key != "seconds"})


def _faults(ensemble: Ensemble) -> list[str | None]:
    """Of each conformer; one without weight is no sample of the target, but counts in the ESS as one that was drawn."""
    finite = torch.isfinite(ensemble.energy).tolist()
    weightless = [False] * len(ensemble) if ensemble.log_weights is None else ensemble.log_weights.isneginf().tolist()
    found = audit(ensemble.molecule, ensemble.positions)
    return [
        fault or ("energy is not finite" if not good else "path weight is zero" if zero else None)
        for fault, good, zero in zip(found, finite, weightless)
    ]


def _row(ensemble: Ensemble, clusters: Clusters, seconds: float) -> dict[str, Any]:
    some = len(ensemble) > 0
    return {
        "kind": "conformers",
        "name": ensemble.molecule.name,
        "smiles": ensemble.molecule.smiles,
        "conformers": len(ensemble),
        "rejected": ensemble.discarded,
        "ess": None if ensemble.log_weights is None else ensemble.ess,
        "reliable": None if ensemble.log_weights is None else ensemble.reliable,
        "clusters": len(clusters.sizes),
        "energy_min": float(ensemble.energy.min()) if some else None,
        "energy_max": float(ensemble.energy.max()) if some else None,
        "energy_unit": ensemble.unit,
        "seconds": seconds,
    }
