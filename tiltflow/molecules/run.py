"""Ensembles of many molecules: generate, audit, cluster. What was generated is kept, so that a run can be resumed.

An error of one molecule, whatever it is, costs that molecule: it is refused, with the reason.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.core.progress import Tell
from tiltflow.core.settings import as_json
from tiltflow.energies.cluster import Cluster
from tiltflow.molecules.audit import audit
from tiltflow.molecules.clusters import Clusters
from tiltflow.molecules.covering import covering_ensemble
from tiltflow.molecules.energies import UnsupportedMolecule
from tiltflow.molecules.ensemble import Ensemble, read_ensemble, state_file
from tiltflow.molecules.generate import generate
from tiltflow.molecules.molecule import Molecule, with_positions
from tiltflow.molecules.read import Read, Reject
from tiltflow.molecules.settings import ConformerSettings
from tiltflow.molecules.stereo import strain
from tiltflow.molecules.workers import apart
from tiltflow.molecules.write import Clustered
from tiltflow.train.store import load_state, save_state, write_bytes

FEW = 4
"""Conformers that are relaxed to look for strain."""
Progress = Callable[[int, int, str], None]


class Made(NamedTuple):
    """What a run made: clustered ensembles, a row for each, refused inputs, and these with conformers left out."""

    found: list[Clustered]
    rows: list[dict[str, Any]]
    refused: list[Reject]
    rejects: list[Reject]


def silent(done: int, total: int, said: str) -> None:
    """Tells nobody."""


def make(
    molecule: Molecule, settings: ConformerSettings, seed: int, cover: bool = False, progress: Progress = silent,
    device: str = "cpu",
) -> Ensemble:  # fmt: skip
    """All samples of one molecule, and where they come from; or, with ``cover``, conformers that cover its minima.

    The networks are on the ``device``.

    Raises:
        UnsupportedMolecule: the energy does not take it.
        TiltflowError: no geometry, a missing package, divergence.
    """
    e = (covering_ensemble if cover else generate)(molecule, settings, seed, progress, device)
    said = {"tiltflow_version": __version__, "energy_model": settings.energy, "seed": str(seed)}
    warned = strain(with_positions(molecule.mol, e.positions[torch.isfinite(e.energy)][:FEW]))
    if notes := [*molecule.notes, *([warned] if warned else [])]:
        said["notes"] = "; ".join(notes)
    return replace(e, provenance={**said, "sampling_temperature": f"{e.sampling_temperature:g} K", **e.provenance})


def sound(ensemble: Ensemble) -> tuple[Ensemble, list[str | None]]:
    """The conformers without a fault, and of each its fault or None.

    One without weight is no sample of the target, but counts in the ESS as one that was drawn.
    """
    finite = torch.isfinite(ensemble.energy).tolist()
    weightless = [False] * len(ensemble) if ensemble.log_weights is None else ensemble.log_weights.isneginf().tolist()
    found = audit(ensemble.molecule, ensemble.positions)
    faults = [
        fault or ("energy is not finite" if not good else "path weight is zero" if zero else None)
        for fault, good, zero in zip(found, finite, weightless)
    ]
    return ensemble.keep(torch.tensor([fault is None for fault in faults], dtype=torch.bool)), faults


def make_all(
    read: Read, settings: ConformerSettings, seed: int, cover: bool, folder: Path, tell: Tell, ray: str | None = None,
    device: str = "cpu", seconds: float = math.inf,
) -> Made:  # fmt: skip
    """Ensembles of all molecules; molecule i has seed ``seed + i``. ``ray``: on this cluster. ``seconds``: of a molecule.

    A conformer with a fault (:func:`~tiltflow.molecules.audit.audit`), or without a finite energy or a weight, is left out
    and named. Molecules that the folder has finished, with the same settings, are not generated again; those that took too
    long, or whose process died, are tried again.
    """
    made = Made([], [], list(read.rejects), [])
    faulty: list[Reject] = []
    paths = [folder / state_file(i) for i in range(len(read.molecules))]
    jobs = [(path, m, settings, seed + i, cover) for i, (path, m) in enumerate(zip(paths, read.molecules))]
    left = [job for job in jobs if not _finished(job[0], _of(*job[2:]))]
    if ray is None:
        _generate_all(left, tell, device, seconds, alone=len(jobs) == 1)
    elif left:
        _generate_on(Cluster(ray), left, tell, device, seconds)
    for path, molecule, line in zip(paths, read.molecules, read.lines):
        ensemble, state = read_ensemble(path), load_state(path)
        if ensemble is None:
            made.refused.append(Reject(line, molecule.name, molecule.smiles, state["refused"]))
            continue
        faults = state["faults"]
        kept = ensemble.keep(torch.tensor([fault is None for fault in faults], dtype=torch.bool))
        faulty += [
            Reject(line, molecule.name, molecule.smiles, f"conformer {j} left out: {fault}")
            for j, fault in enumerate(faults, 1)
            if fault is not None
        ]
        made.found.append((kept, Clusters(**state["clusters"])))
        made.rows.append({**kept.row(), "clusters": len(made.found[-1][1].sizes), "seconds": state["seconds"]})
    made.rejects.extend(sorted(made.refused + faulty, key=lambda r: r.line))
    return made


def ensembles_of(folder: Path) -> list[Ensemble]:
    """The ensembles that a run folder holds, one per molecule that was not refused."""
    every = [read_ensemble(path) for path in sorted(folder.glob("molecule-*.safetensors"))]
    return [sound(ensemble)[0] for ensemble in every if ensemble is not None]


def _of(settings: ConformerSettings, seed: int, cover: bool) -> str:
    """What must be the same for the samples to be the same."""
    return json.dumps([as_json(settings), seed, cover])


def _finished(path: Path, of: str) -> bool:
    if not path.is_file():
        return False
    state = load_state(path)
    return state.get("of") == of and not state.get("again")


Job = tuple[Path, Molecule, ConformerSettings, int, bool]


def _generate_all(jobs: list[Job], tell: Tell, device: str, seconds: float, alone: bool) -> None:
    """In processes of their own, one per core; a lone molecule stays in this process and shows more.

    Its time is looked at whenever it reports, and a defect of ours is not caught.
    """
    if alone:
        for job in jobs:
            said = _limited(partial(tell, f"1/1 {job[1].name}"), seconds)
            _keep(*job, device, said, caught=TiltflowError)
        return
    count = iter(range(1, len(jobs) + 1))

    def done(i: int, problem: str | None) -> None:
        path, molecule, of = jobs[i][0], jobs[i][1], _of(*jobs[i][2:])
        if problem is not None:
            save_state(path, {"refused": problem, "of": of, "again": True})
        tell("molecules", next(count), len(jobs), molecule.name)

    workers = min(len(jobs), torch.get_num_threads()) if device == "cpu" else 1
    apart(_keep_alone, [(*job, device) for job in jobs], workers, seconds, done)


def _keep_alone(*job: Any) -> None:
    torch.set_num_threads(1)
    _keep(*job)


def _limited(progress: Progress, seconds: float) -> Progress:
    """Raises TiltflowError when it is told something too late."""
    until = time.monotonic() + seconds

    def told(done: int, total: int, said: str) -> None:
        if time.monotonic() > until:
            raise TiltflowError(f"it took more than {seconds:g} s; --time-limit sets how long a molecule may take")
        progress(done, total, said)

    return told


def _generate_on(cluster: Cluster, jobs: list[Job], tell: Tell, device: str, seconds: float) -> None:
    """One worker of a cluster per molecule; the files are written here."""
    count = iter(range(1, len(jobs) + 1))

    def keep(i: int, content: bytes) -> None:
        write_bytes(jobs[i][0], content)
        tell("molecules", next(count), len(jobs), jobs[i][1].name)

    try:
        cluster.map(_kept, [(seconds, *job[1:], device) for job in jobs], keep)
    finally:
        cluster.close()


def _kept(seconds: float, molecule: Molecule, settings: ConformerSettings, seed: int, cover: bool, device: str) -> bytes:
    """The file of a molecule, made elsewhere."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / state_file(0)
        _keep(path, molecule, settings, seed, cover, device, _limited(silent, seconds))
        return path.read_bytes()


def _keep(
    path: Path, molecule: Molecule, settings: ConformerSettings, seed: int, cover: bool, device: str,
    progress: Progress = silent, caught: type[Exception] = Exception,
) -> None:  # fmt: skip
    """Make, audit and cluster a molecule, or say why not, in a file."""
    started, of = time.perf_counter(), _of(settings, seed, cover)
    try:
        ensemble = make(molecule, settings, seed, cover, progress, device)
        kept, faults = sound(ensemble)
        found = kept.clusters()
    except caught as error:
        save_state(path, {"refused": _reason(error, molecule), "of": of})
        return
    seconds = time.perf_counter() - started
    ensemble.write(path, seconds=seconds, of=of, faults=faults, clusters=found._asdict())


def _reason(error: Exception, molecule: Molecule) -> str:
    if not isinstance(error, TiltflowError):
        return f"{type(error).__name__}: {error}"
    whose = f"{molecule.name} ({molecule.smiles}): "
    return error.reason if isinstance(error, UnsupportedMolecule) else str(error).removeprefix(whose).rstrip(".")
