"""A run folder of amortised training: which molecules, the checkpoint, the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.amortised import AmortisedSettings, prepare, save_amortised, train_amortised
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.read import read_molecules
from tiltflow.molecules.split import read_training_smiles
from tiltflow.run.folder import RunFolder

MODEL = "model.safetensors"
RECENT = 20
"""Rounds that the figures of a run are means over."""


@dataclass(frozen=True)
class ConformerTraining:
    """Everything such a run depends on; the run folder's config.json. Temperature in K; ``max_atoms`` with hydrogens."""

    source: str
    molecules: int
    energy: str
    temperature: float
    max_atoms: int
    rounds: int
    seed: int

    def settings(self) -> AmortisedSettings:
        """Of the training."""
        defaults = AmortisedSettings(energy=self.energy, temperature=self.temperature)
        return replace(defaults, sampler=replace(defaults.sampler, rounds=self.rounds))

    def choose(self) -> list[Molecule]:
        """``molecules`` good ones of the source, in random order by the seed; what read_molecules refuses is passed over.

        Raises:
            TiltflowError: no such file, or not one good molecule in it.
        """
        path = Path(self.source)
        if path.suffix == ".gz":
            smiles = read_training_smiles(path)
            found: list[Molecule] = []
            for i in np.random.default_rng(self.seed).permutation(len(smiles)):
                found += read_molecules(smiles[i], None, self.max_atoms).molecules
                if len(found) == self.molecules:
                    break
        else:
            every = read_molecules(self.source, None, self.max_atoms).molecules
            found = [every[i] for i in np.random.default_rng(self.seed).permutation(len(every))[: self.molecules]]
        if not found:
            raise TiltflowError(f"{path}: not one molecule of at most {self.max_atoms} atoms can be trained on.")
        return found


def run_training(
    config: ConformerTraining, chosen: list[Molecule], folder: RunFolder, progress: Callable[[str, int, int, str], None]
) -> dict[str, Any]:
    """Train, with checkpoints every 10 rounds, and write the model; one row about the run."""
    started, settings = time.perf_counter(), config.settings()
    prepared = prepare(chosen, settings, config.seed, lambda done, total, said: progress("templates", done, total, said))

    def report(row: dict[str, Any]) -> None:
        said = f"energy {row['energy']:.1f} kT, ESS {row['ess']:.3f}"
        progress("training", row["iteration"] + 1, config.rounds, said)

    resume = folder.checkpoint.is_file()
    model = train_amortised(prepared, settings, config.seed, folder.checkpoint, resume, report)
    save_amortised(folder.path / MODEL, model)
    last = model.history[-RECENT:]
    return {
        "molecules": len(prepared),
        "templates": sum(len(one.templates) for one in prepared),
        "ess": mean(r["ess"] for r in last),
        "energy": mean(r["energy"] for r in last),
        "energy_calls": model.history[-1]["energy_calls"],
        "seconds": time.perf_counter() - started,
        "model": MODEL,
    }
