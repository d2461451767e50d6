r"""`tiltflow bench conformers`: which share of reference conformers generated ones cover, method by method.

Protocol (Ganea et al. 2021, arXiv:2106.07802; its numbers as in Adjoint Sampling, arXiv:2504.11713): a molecule has L' CREST
conformers. At most 512 are used, evenly spaced along the file; L = max(that number, 128), and every method gives K = 2L
conformers, so that 256 ≤ K ≤ 1024. RMSD is that of the heavy atoms up to symmetry (:mod:`tiltflow.molecules.rmsd`).
Recall is the share of references with a generated conformer within a threshold, AMR the mean smallest RMSD; precision is the
same with the roles exchanged. All before and after relaxation: at most 200 iterations of RDKit's MMFF94 from every generated
conformer, whatever the method. References are never relaxed.

Means are over molecules; the interval is the 95 % bootstrap over molecules (10,000 resamples, seed 0), so it tells how far
another choice of molecules would move the mean, not how far another seed would. A molecule that a method fails on has
coverage 0, no AMR, and is named; one whose references cannot be used (damaged, or of another molecule than its SMILES) is
skipped, and named. ``energy_calls`` are of the method, without relaxation; ``seconds`` are of the method and,
in relaxed rows, of relaxation too. Rows are of four kinds: "summary"; "share", the recall of only the first part of the K
conformers; "molecule"; "skipped".
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from torch import Tensor

from tiltflow._version import __version__
from tiltflow.bench.tilt import run_apart
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import check_value
from tiltflow.molecules.amortised import SHIPPED
from tiltflow.molecules.audit import audit
from tiltflow.molecules.cartesian import FROM_CONFORMERS, train_cartesian
from tiltflow.molecules.covering import EXTRA, chosen, covering
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.geom import Listed, Reference, list_molecules, read_reference
from tiltflow.molecules.molecule import Molecule, positions_of
from tiltflow.molecules.rmsd import coverage, rmsd_matrix
from tiltflow.molecules.settings import CartesianSettings, MoleculeSeed
from tiltflow.molecules.split import read_training_smiles, unseen
from tiltflow.molecules.templates import RELAXATION, relax
from tiltflow.molecules.torsions import place, rotatable_torsions
from tiltflow.train.store import write_text

Row = dict[str, Any]
THRESHOLDS = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Å."""
MOST_REFERENCES, FEWEST, PER_REFERENCE = 512, 128, 2
SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)
FLEXIBLE = 7
SUBSETS = {"all": 0, f"≥ {FLEXIBLE} rotatable bonds": FLEXIBLE}
"""By the data's own count of rotatable bonds."""
RESAMPLES = 10_000
ATTEMPTS = 5
DATA = Path(__file__).parents[2] / "benchmarks" / "data" / "geom_drugs"
TRAINING = "spice_train_smiles.tsv.gz"
COLUMNS = (
    "method", "relaxed", "subset", "threshold", "molecules", "recall_coverage", "recall_coverage_low",
    "recall_coverage_high", "recall_amr", "precision_coverage", "precision_amr", "energy_calls", "seconds",
)  # fmt: skip
"""Of the summary that is printed."""


class Generated(NamedTuple):
    """Conformers (n, N, 3), in Å, and what they cost: rows an energy evaluated, wall seconds."""

    positions: Tensor
    energy_calls: int
    seconds: float


def rdkit(molecule: Molecule, n: int, seed: int) -> Generated:
    """n geometries of ETKDGv3 (Riniker & Landrum 2015; Wang et al. 2020), none left out for being like another.

    Raises:
        TiltflowError: fewer than n after five attempts, the later ones from random coordinates.
    """
    started = time.perf_counter()
    mol, found = Chem.Mol(molecule.mol), positions_of(molecule.mol)
    for attempt in range(ATTEMPTS):
        options: Any = rdDistGeom.ETKDGv3()
        options.randomSeed = int(np.random.default_rng([seed, attempt]).integers(1, 1 << 30))
        options.enableSequentialRandomSeeds = True  # else conformer k has k times the seed: all alike if it is 0
        options.useRandomCoords = attempt > 0
        rdDistGeom.EmbedMultipleConfs(mol, n - len(found), options)
        found = torch.cat([found, positions_of(mol)])
        if len(found) == n:
            return Generated(found, 0, time.perf_counter() - started)
    raise TiltflowError(f"RDKit embedded {len(found)} of {n} conformers of {molecule.name!r} in {ATTEMPTS} attempts.")


def rdkit_random_torsions(molecule: Molecule, n: int, seed: int) -> Generated:
    """Geometries of :func:`rdkit` with every torsion of the torsional sampler at a uniform angle."""
    positions, calls, seconds = rdkit(molecule, n, seed)
    started = time.perf_counter()
    torsions = rotatable_torsions(molecule, conjugated=True)
    turns = torch.rand(n, len(torsions.atoms), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Generated(place(positions, torsions, 2 * torch.pi * turns), calls, seconds + time.perf_counter() - started)


def rdkit_random_torsions_chosen(molecule: Molecule, n: int, seed: int) -> Generated:
    """Of n + 512 of :func:`rdkit_random_torsions` the n that :func:`torsional` would choose: what its choice is worth."""
    drawn = rdkit_random_torsions(molecule, n + EXTRA, seed)
    started = time.perf_counter()
    return Generated(chosen(molecule, drawn.positions, n).drawn, 0, drawn.seconds + time.perf_counter() - started)


def torsional(molecule: Molecule, n: int, seed: int, model: str | None = None) -> Generated:
    """:func:`tiltflow.molecules.covering.covering`, as drawn; the benchmark relaxes them itself, like all others.

    The third recipe, set on four molecules of SPICE, whose low GFN2 energies were the references, after two others were less
    than random torsions, relaxed, on the forty molecules (docs/lab-notes.md).
    """
    started = time.perf_counter()
    made = covering(molecule, n, seed, model)
    return Generated(made.drawn, made.energy_calls, time.perf_counter() - started)


def torsional_amortised(molecule: Molecule, n: int, seed: int) -> Generated:
    """:func:`torsional` without training: drawn from the shipped model, which saw 168 other molecules (MODEL_CARD.md)."""
    return torsional(molecule, n, seed, str(SHIPPED))


def cartesian(molecule: Molecule, n: int, seed: int, settings: CartesianSettings | None = None) -> Generated:
    """n draws of a Cartesian sampler of all atoms, trained on this molecule's MMFF94 at 700 K.

    Those with an energy that is not finite or with a fault in the audit are drawn again; all count.

    Raises:
        TiltflowError: fewer than n that are sound after five attempts.
    """
    started = time.perf_counter()
    energy = open_energy("mmff94", molecule)
    sampler = train_cartesian(energy, 700.0, molecule, settings, seed)
    generator, found = torch.Generator().manual_seed(seed), torch.zeros(0, *positions_of(molecule.mol).shape[1:])
    for _ in range(ATTEMPTS):
        drawn = sampler.draw(n - len(found), generator)
        sound = [bool(e.isfinite()) and not fault for e, fault in zip(drawn.energy, audit(molecule, drawn.x))]
        found = torch.cat([found, drawn.x[torch.tensor(sound)].to(found)])
        if len(found) == n:
            return Generated(found.double(), sampler.energy.evaluations, time.perf_counter() - started)
    raise TiltflowError(f"the Cartesian sampler of {molecule.name!r}: {len(found)} of {n} in {ATTEMPTS} attempts.")


def cartesian_pretrained(molecule: Molecule, n: int, seed: int) -> Generated:
    """:func:`cartesian` after bridge matching on 100 conformers of RDKit."""
    return cartesian(molecule, n, seed, FROM_CONFORMERS)


METHODS: dict[str, Callable[[Molecule, int, int], Generated]] = {
    "rdkit": rdkit,
    "rdkit_random_torsions": rdkit_random_torsions,
    "rdkit_random_torsions_chosen": rdkit_random_torsions_chosen,
    "torsional": torsional,
    "torsional_amortised": torsional_amortised,
    "cartesian": cartesian,
    "cartesian_pretrained": cartesian_pretrained,
}
"""(molecule, n, seed) → n conformers. A learned sampler is added here, and nowhere else."""


def chosen_generators(text: str) -> tuple[str, ...]:
    """ "all" or names with commas. Raises TiltflowError for an unknown or repeated one."""
    names = tuple(METHODS) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in METHODS or names.count(name) > 1:
            raise TiltflowError(f"method {name!r} in {text!r}: use all, or once each, with commas, of {', '.join(METHODS)}.")
    return names


def bench_conformers(
    data: Path,
    methods: tuple[str, ...],
    seed: int,
    molecules: int | None = None,
    parts: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Rows of every kind, each molecule and method in a process and on a thread of its own.

    Args:
        data: a folder as in :mod:`tiltflow.molecules.geom`; beside it, if there, the list of training molecules to avoid.
        molecules: only the first of them (None: all). methods: of :data:`METHODS`.
        parts: folder where finished molecules are kept and found again (None: nowhere).

    Raises:
        TiltflowError: no such data, no molecule that is not skipped, ``molecules`` out of range, one that was trained on.
    """
    listed = list_molecules(data)
    count = len(listed) if molecules is None else molecules
    if not 1 <= count <= len(listed):
        raise TiltflowError(f"--molecules {molecules}: {data} has {len(listed)}.")
    check_value("seed", seed, MoleculeSeed)
    listed, references, skipped = _references(data, listed[:count])
    training = data.parent / TRAINING
    if training.is_file():
        unseen([r.molecule for r in references], read_training_smiles(training))
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
    jobs = [(method, line, reference) for method in methods for line, reference in zip(listed, references)]
    kept = [_kept(method, reference, seed, parts) for method, _, reference in jobs]
    missing = [(method, str(data), line, seed, parts) for (method, line, _), old in zip(jobs, kept) if old is None]
    fresh = iter(run_apart(_apart, missing, progress) if missing else [])
    rows = [row for old in kept for row in (old or [next(fresh), next(fresh)])]
    head = {"listed": len(list_molecules(data)), "checked_unseen": training.is_file()}
    return [row | head for row in summarise(rows)] + by_share(rows) + rows + skipped


def _references(data: Path, listed: list[Listed]) -> tuple[list[Listed], list[Reference], list[Row]]:
    """Those that can be used, and a row for each of the others. TiltflowError: none can."""
    good: list[tuple[Listed, Reference]] = []
    skipped: list[Row] = []
    for line in listed:
        try:
            good.append((line, read_reference(data, line)))
        except TiltflowError as error:
            if len(listed) == len(skipped) + 1:
                raise
            skipped.append({"kind": "skipped", "molecule": line.name, "reason": str(error)})
    return [line for line, _ in good], [reference for _, reference in good], skipped


def _apart(method: str, data: str, listed: Listed, seed: int, parts: Path | None, threads: int) -> list[Row]:
    torch.set_num_threads(1)
    reference = read_reference(Path(data), listed)
    rows = bench_molecule(reference, method, seed)
    if parts is not None:
        record = {"of": _identity(method, reference, seed), "rows": rows}
        write_text(_part(method, reference, seed, parts), json.dumps(record))
    return rows


def _part(method: str, reference: Reference, seed: int, parts: Path) -> Path:
    return parts / f"{method}-{reference.molecule.name}-{seed}.json"


def _identity(method: str, reference: Reference, seed: int) -> list[Any]:
    """What must be the same for a result to be the same; the code of the method is not in it, its version is."""
    protocol = [MOST_REFERENCES, FEWEST, PER_REFERENCE, RELAXATION, list(THRESHOLDS), list(SHARES)]
    digest = sha256(reference.positions.numpy().tobytes()).hexdigest()
    return [__version__, method, seed, reference.molecule.smiles, digest, protocol]


def _kept(method: str, reference: Reference, seed: int, parts: Path | None) -> list[Row] | None:
    """What an interrupted run left of a molecule, if it was the same work."""
    if parts is None or not (path := _part(method, reference, seed, parts)).is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["rows"] if record["of"] == _identity(method, reference, seed) else None
    except (ValueError, LookupError, TypeError) as error:
        raise TiltflowError(f"{path} is damaged ({error}); delete it.") from error


def bench_molecule(reference: Reference, method: str, seed: int) -> list[Row]:
    """Two rows of one method on one molecule: as generated, and relaxed."""
    molecule = reference.molecule
    references = reference.positions
    used = references[evenly(len(references), MOST_REFERENCES)]
    n = PER_REFERENCE * max(len(used), FEWEST)
    head = {
        "kind": "molecule", "molecule": molecule.name, "smiles": molecule.smiles, "method": method, "seed": seed,
        "rotatable_bonds": reference.rotatable_bonds, "references": len(used), "references_found": len(references),
        "references_of_other_stereo": reference.other_stereo, "generated": n,
    }  # fmt: skip
    try:
        made = METHODS[method](molecule, n, seed)
        if len(made.positions) != n:
            raise TiltflowError(f"{method} gave {len(made.positions)} conformers of {molecule.name!r} instead of {n}.")
        plain = _scores(rmsd_matrix(molecule, used, made.positions))
    except Exception as error:
        return [head | {"relaxed": relaxed} | _failure(error) for relaxed in (False, True)]
    cost = {"energy_calls": made.energy_calls, "seconds": made.seconds}
    rows = [head | {"relaxed": False} | plain | cost]
    started = time.perf_counter()
    try:
        positions = relax(molecule, made.positions)
        cost["seconds"] += time.perf_counter() - started
        return rows + [head | {"relaxed": True} | _scores(rmsd_matrix(molecule, used, positions)) | cost]
    except Exception as error:
        return rows + [head | {"relaxed": True} | _failure(error)]


def evenly(n: int, most: int) -> Tensor:
    """At most ``most`` of the numbers 0 … n − 1, evenly spaced, the ends among them."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def _scores(matrix: Tensor) -> Row:
    """Coverage of a matrix of RMSDs (references, generated)."""
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float64)
    found = coverage(matrix, thresholds)
    shares = [coverage(matrix[:, : max(1, round(s * matrix.shape[1]))], thresholds).recall.tolist() for s in SHARES]
    return {
        "recall_coverage": found.recall.tolist(), "recall_amr": found.recall_amr,
        "precision_coverage": found.precision.tolist(), "precision_amr": found.precision_amr, "recall_by_share": shares,
    }  # fmt: skip


def _failure(error: Exception) -> Row:
    said = str(error) if isinstance(error, TiltflowError) else f"{type(error).__name__}: {error}"
    nothing = [0.0] * len(THRESHOLDS)
    scores = {"recall_coverage": nothing, "precision_coverage": nothing, "recall_by_share": [nothing] * len(SHARES)}
    return {**scores, "recall_amr": None, "precision_amr": None, "energy_calls": 0, "seconds": 0.0, "error": said}


def _groups(rows: Iterable[Row]) -> dict[tuple[str, bool, str], list[Row]]:
    """Molecules by method, relaxation and subset; subsets without a molecule are left out."""
    groups: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        for subset, fewest in SUBSETS.items():
            if row["rotatable_bonds"] >= fewest:
                groups.setdefault((row["method"], row["relaxed"], subset), []).append(row)
    return groups


def summarise(rows: list[Row]) -> list[Row]:
    """A row per method, relaxation, subset and threshold, from those of single molecules."""
    summary: list[Row] = []
    for (method, relaxed, subset), group in _groups(rows).items():
        cost = {key: sum(r[key] for r in group) for key in ("energy_calls", "seconds")}
        amr = {key: _mean([r[key] for r in group]) for key in ("recall_amr", "precision_amr")}
        failed = {"failed": [r["molecule"] for r in group if "error" in r]}
        for k, threshold in enumerate(THRESHOLDS):
            recall = [r["recall_coverage"][k] for r in group]
            low, high = interval(recall)
            head = {"kind": "summary", "method": method, "relaxed": relaxed, "subset": subset, "threshold": threshold}
            shares = {
                "molecules": len(group), "recall_coverage": _mean(recall), "recall_coverage_low": low,
                "recall_coverage_high": high, "precision_coverage": _mean([r["precision_coverage"][k] for r in group]),
            }  # fmt: skip
            summary.append(head | shares | amr | cost | failed)
    return summary


def by_share(rows: list[Row]) -> list[Row]:
    """Mean recall of the first 1/64, 1/16, 1/4 and all of the K conformers."""
    return [
        {"kind": "share", "method": method, "relaxed": relaxed, "subset": subset, "threshold": threshold, "share": share,
         "recall_coverage": _mean([r["recall_by_share"][s][k] for r in group])}
        for (method, relaxed, subset), group in _groups(rows).items()
        for k, threshold in enumerate(THRESHOLDS)
        for s, share in enumerate(SHARES)
    ]  # fmt: skip


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def interval(values: list[float]) -> tuple[float, float]:
    """The central 95 % of the means of 10,000 resamples."""
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)
