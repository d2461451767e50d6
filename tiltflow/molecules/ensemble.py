r"""Conformers with their weights.

A sampler that follows q instead of p* ∝ e^{−E/kT} corrects itself by path weights w ∝ dP*/dQ, and the weight of a sample is
its normalised path weight, w_i / Σ w. It is never multiplied by e^{−E/kT}: the energy is in the samples already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json
from tiltflow.core.weights import ess, normalised
from tiltflow.molecules.judge import RELIABLE, judge_conformers
from tiltflow.molecules.settings import ConformersConfig, require_rdkit
from tiltflow.run.folder import FORMAT, RunFolder
from tiltflow.train.store import load_state, save_state
from tiltflow.verdict.line import Verdict

if TYPE_CHECKING:  # RDKit is imported where it is used
    from tiltflow.molecules.clusters import Clusters
    from tiltflow.molecules.energies.interface import Unit
    from tiltflow.molecules.molecule import Molecule

UNKNOWN, NO_WEIGHT = "cannot tell", "none"
"""In place of the weights of an unreliable ensemble; and of conformers that were chosen, not drawn."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Samples of one molecule. Rows that are not finite may be in it: :func:`tiltflow.molecules.audit.audit` names them.

    Args:
        positions: (n, N, 3), Å, float64, atoms in the order of ``molecule.mol``.
        energy: (n,), in ``unit``, e.g. "kcal/mol".
        log_weights: log path weights (n,), up to a constant, at ``temperature``; None: conformers that were chosen, not
            drawn, and have no weights (:mod:`tiltflow.molecules.covering`).
        temperature: in K, of the target. sampling_temperature: in K, at which the sampler was trained.
        provenance: what made it: energy, seed, versions; written beside every conformer.
        discarded: samples with a fault that were left out; they count as samples without weight in the ESS.
        group: (n,), of independent groups of walkers, whose spread is a population's error; None: samples are independent.
        unsampled: names of labels (bonds, rings, nitrogens) whose states are neither sampled nor enumerated.

    Raises:
        TiltflowError: shapes that do not fit, temperatures that are not positive, log weights that are NaN, +∞ or all −∞.
    """

    molecule: Molecule
    positions: Tensor
    energy: Tensor
    unit: str
    log_weights: Tensor | None
    temperature: float
    sampling_temperature: float
    provenance: dict[str, str]
    discarded: int = 0
    group: Tensor | None = None
    unsampled: str = ""

    def __post_init__(self) -> None:
        n, atoms = len(self.positions), self.molecule.mol.GetNumAtoms()
        log_w = self.log_weights
        if self.positions.shape != (n, atoms, 3) or self.positions.dtype != torch.float64 or self.energy.shape != (n,):
            raise TiltflowError(
                f"{self.molecule.name}: positions are {tuple(self.positions.shape)} {self.positions.dtype} and energies "
                f"{tuple(self.energy.shape)}; they must be (n, {atoms}, 3) torch.float64, in Å, and (n,)."
            )
        if log_w is not None and log_w.shape != (n,):
            raise TiltflowError(f"{self.molecule.name}: log weights are {tuple(log_w.shape)}; they must be ({n},), or None.")
        if log_w is not None and n > 0 and not torch.isfinite(log_w.max()):  # of NaN and numbers, the maximum is NaN
            raise TiltflowError(f"{self.molecule.name}: log weights are NaN, +∞, or all −∞. Has the sampler diverged?")
        if not (self.temperature > 0 and self.sampling_temperature > 0):
            raise TiltflowError(
                f"{self.molecule.name}: temperatures must be positive, in K; got {self.temperature} and "
                f"{self.sampling_temperature}."
            )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def weights(self) -> Tensor:
        """Normalised path weights at ``temperature``, (n,), float64: they sum to 1. TiltflowError: there are none."""
        if self.log_weights is None:
            raise TiltflowError(f"{self.molecule.name}: conformers that were chosen to cover have no weights.")
        return normalised(self.log_weights)

    @property
    def ess(self) -> float:
        """Effective sample size as a fraction of all samples drawn, (Σw)²/(N Σw²), N = n + discarded; 0 without weights."""
        if self.log_weights is None or not len(self):
            return 0.0
        return len(self) / (len(self) + self.discarded) * ess(self.log_weights)

    @property
    def reliable(self) -> bool:
        """The weights mean something: ESS ≥ 0.05, no label unsampled. Else "cannot tell" stands in place of every weight."""
        return self.ess >= RELIABLE and not self.unsampled

    def keep(self, rows: Tensor) -> Self:
        """The samples of a mask (n,); their weights sum to 1 again. Raises TiltflowError if none of them has a weight."""
        return replace(
            self,
            positions=self.positions[rows],
            energy=self.energy[rows],
            log_weights=None if self.log_weights is None else self.log_weights[rows],
            discarded=self.discarded + int((~rows).sum()),
            group=None if self.group is None else self.group[rows],
        )

    def verdict(self) -> Verdict:
        """Can the weights be told? See :mod:`tiltflow.molecules.judge`. TiltflowError: there are none."""
        found = judge_conformers([self.row()])
        if found is None:
            raise TiltflowError(f"{self.molecule.name}: conformers that were chosen to cover have no weights to judge.")
        return found

    def row(self) -> dict[str, Any]:
        """The ensemble in numbers."""
        some, weighted = len(self) > 0, self.log_weights is not None
        return {
            "name": self.molecule.name,
            "smiles": self.molecule.smiles,
            "conformers": len(self),
            "rejected": self.discarded,
            "ess": self.ess if weighted else None,
            "reliable": self.reliable if weighted else None,
            "coordinates": self.provenance.get("coordinates"),
            "unsampled": self.unsampled,
            "energy_min": float(self.energy.min()) if some else None,
            "energy_max": float(self.energy.max()) if some else None,
            "energy_unit": self.unit,
            "notes": self.provenance.get("notes"),
        }

    def clusters(self, threshold: float = 1.0) -> Clusters:
        """Clusters by shape, within ``threshold`` Å; the largest population first. The cost grows with n²."""
        from tiltflow.molecules.clusters import clusters

        weights = self.weights if self.reliable else None
        return clusters(self.molecule, self.positions, self.energy, weights, threshold, self.group)

    def free_energies(self, clusters: Clusters) -> list[tuple[float, float]] | None:
        """−kT ln p of each cluster above the first, in ``unit``, and its standard error; None if they cannot be told."""
        if clusters.populations is None or clusters.errors is None:
            return None
        from tiltflow.molecules.energies import kt_per

        kt = 1 / kt_per(cast("Unit", self.unit), self.temperature)
        shares = zip(clusters.populations, clusters.errors)
        return [(kt * math.log(clusters.populations[0] / p), kt * e / p) if p else (math.inf, math.inf) for p, e in shares]

    def records(self, clusters: Clusters) -> list[dict[str, str]]:
        """One row of texts per conformer, as conformers.csv holds them.

        name, smiles, conformer (from 1), energy, relative_energy (above the lowest) and energy_unit, weight at the
        temperature (those of a molecule sum to 1; "cannot tell" if they are unreliable, "none" if there are none), cluster
        (from 1, the most populated first) and its population, with the standard error.
        """
        shares, lowest = self.population_texts(clusters), float(self.energy.min()) if len(self) else 0.0
        numbers = zip(self.energy.double().tolist(), self._weight_texts(), clusters.labels.tolist())
        return [
            {
                "name": self.molecule.name,
                "smiles": self.molecule.smiles,
                "conformer": str(i),
                "energy": repr(energy),
                "relative_energy": f"{energy - lowest:.6f}",
                "energy_unit": self.unit,
                "weight": weight,
                "cluster": str(cluster + 1),
                "population": shares[cluster],
                "temperature": NO_WEIGHT if self.log_weights is None else f"{self.temperature:g} K",
            }
            for i, (energy, weight, cluster) in enumerate(numbers, 1)
        ]

    def properties(self, clusters: Clusters) -> list[dict[str, str]]:
        """The same with where it comes from, and with the data fields of the input, as SD records hold them.

        A field of the input with a name of ours is called "input NAME".
        """
        stuck = {"unsampled": self.unsampled} if self.unsampled else {}
        rows = [{**self.provenance, **stuck, **row} for row in self.records(clusters)]
        return [{(f"input {k}" if k in row else k): v for k, v in self.molecule.fields.items()} | row for row in rows]

    def population_texts(self, clusters: Clusters) -> list[str]:
        """Of each cluster its population ± its standard error."""
        if clusters.populations is None or clusters.errors is None:
            return [NO_WEIGHT if self.log_weights is None else UNKNOWN] * len(clusters.sizes)
        return [f"{p:.4f} ± {e:.4f}" for p, e in zip(clusters.populations, clusters.errors)]

    def _weight_texts(self) -> list[str]:
        if self.log_weights is None:
            return [NO_WEIGHT] * len(self)
        return [repr(w) for w in self.weights.tolist()] if self.reliable else [UNKNOWN] * len(self)

    def to_sdf(self, path: Path | str) -> Path:
        """Write every conformer, with its record and where it comes from, into an SD file; returns the path."""
        from tiltflow.molecules.sdf import write_sdf

        write_sdf(Path(path), [(self.molecule, self.positions, self.properties(self.clusters()))])
        return Path(path)

    def save(self, folder: Path | str) -> Path:
        """Write the ensemble into a new folder, for :func:`tiltflow.load`, which gives a list of this one.

        Raises:
            TiltflowError: the folder exists and is not empty.
        """
        target = Path(folder)
        config = {"job": "conformers", "format": FORMAT, **as_json(ConformersConfig(input=None))}
        with RunFolder(target, config, writes=(state_file(0),)):
            self.write(target / state_file(0))
        return target

    def write(self, path: Path, **more: Any) -> None:
        """Write the molecule, with its atoms in their order, and all its samples; with ``more`` beside them."""
        from tiltflow.molecules.molecule import packed

        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "molecule"}
        save_state(path, {"ensemble": {**fields, "molecule": packed(self.molecule)}, **more})


def state_file(i: int) -> str:
    """The file of molecule i in a run folder."""
    return f"molecule-{i:05}.safetensors"


def read_ensemble(path: Path) -> Ensemble | None:
    """What :meth:`Ensemble.write` wrote; None if the file says that the molecule was refused."""
    require_rdkit()
    from tiltflow.molecules.molecule import unpacked

    state = load_state(path).get("ensemble")
    if state is None:
        return None
    return Ensemble(**{**state, "molecule": unpacked(state["molecule"])})
