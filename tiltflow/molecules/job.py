"""Runs over molecules: conformers of all molecules of a file, and the training of one sampler for many molecules.

A folder of conformers holds config.json, conformers.sdf, conformers.csv, rejects.csv, metrics.json, report.html and, for
each finished molecule, a file of all samples; one of training holds model.safetensors. RDKit is imported where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.energies.cluster import Cluster
from tiltflow.molecules.files import kind, rows
from tiltflow.molecules.judge import RELIABLE, judge_conformers
from tiltflow.molecules.settings import (
    ConformersConfig,
    ConformerSettings,
    ConformerTrainingConfig,
    TorsionalSettings,
    require_rdkit,
)
from tiltflow.report import training_blocks
from tiltflow.report.figures import SAMPLING
from tiltflow.run.job import Outcome, Work
from tiltflow.train.distributed import world

if TYPE_CHECKING:
    from tiltflow.molecules.amortised import Amortised
    from tiltflow.molecules.ensemble import Ensemble
    from tiltflow.molecules.molecule import Molecule
    from tiltflow.molecules.read import Read
    from tiltflow.molecules.run import Made

MODEL = "model.safetensors"
RECENT = 20
"""Rounds that the figures of a training are means over."""


def _require_energies(molecules: list[Molecule], *energies: str | None) -> None:
    """Open the energies for the first molecule that they take, or not at all; of a lone molecule it must be taken.

    Raises:
        TiltflowError: an energy that cannot be opened, or that does not take the only molecule.
    """
    from tiltflow.molecules.energies import UnsupportedMolecule, open_energy

    for energy in (name for name in energies if name is not None):
        for molecule in molecules:
            try:
                open_energy(energy, molecule)
                break
            except UnsupportedMolecule:
                if len(molecules) == 1:
                    raise


@settings
class ConformersJob(ConformersConfig):
    """A run that makes conformers."""

    name: ClassVar[str] = "conformers"
    writes: ClassVar[tuple[str, ...]] = ("conformers.sdf", "conformers.csv", "rejects.csv", "molecule-[0-9]*.safetensors")

    @property
    def alone(self) -> bool:
        """Whether the input is a SMILES."""
        return self.input is not None and kind(self.input) is None

    @property
    def anchored(self) -> ConformerSettings:
        """The settings with the model by its absolute path."""
        model = self.settings.model
        return self.settings if model is None else replace(self.settings, model=str(Path(model).resolve()))

    @cached_property
    def molecules(self) -> Read:
        """What the input holds."""
        require_rdkit()
        from tiltflow.molecules.read import read_molecules

        if self.input is None:
            raise TiltflowError("this ensemble was saved from Python and is not a run: give an input.")
        return read_molecules(self.input, None, self.max_atoms, self.enumerate_stereo)

    def config(self) -> dict[str, Any]:
        """The fields as JSON, files by their absolute paths, and what the input held; but for who did the work and how long
        it might take."""
        assert self.input is not None
        content = self.input.encode() if self.alone else Path(self.input).read_bytes()
        where = self.input if self.alone else str(Path(self.input).resolve())
        return {name: value for name, value in as_json(self).items() if name not in ("ray", "time_limit")} | {
            "input": where,
            "input_sha256": hashlib.sha256(content).hexdigest(),
            "settings": as_json(self.anchored),
        }

    @classmethod
    def read(cls, config: dict[str, Any], folder: Path) -> Self:
        """The job of a config.json."""
        fields = {k: v for k, v in config.items() if k not in ("job", "format", "input_sha256")}
        return from_json(cls, fields, str(folder / "config.json"))

    def check(self) -> None:
        """Find misuse: the input, the energies, the model.

        Raises:
            TiltflowError: of these; of a SMILES also why it is refused.
        """
        if world().size > 1:
            raise TiltflowError("conformers starts processes of its own, one per core: run it in one process.")
        if self.ray is not None:
            Cluster(self.ray)  # is one there?
        read = self.molecules
        if self.alone and read.rejects:
            raise TiltflowError(f"{self.input}: {read.rejects[0].reason}.")
        _require_energies(read.molecules, self.settings.energy, self.settings.rescore)
        if self.settings.model is not None:
            from tiltflow.molecules.amortised import load_amortised

            load_amortised(Path(self.settings.model))

    def load(self, folder: Path, device: str = "cpu") -> list[Ensemble]:
        """The ensembles of a run folder, or of one that an ensemble was saved in; without those that were refused."""
        require_rdkit()
        from tiltflow.molecules.run import ensembles_of

        return ensembles_of(folder)

    def train(self, work: Work) -> Made:
        """Make, audit and cluster conformers of every molecule."""
        from tiltflow.molecules.run import make_all

        return make_all(
            self.molecules, self.anchored, self.seed, self.cover, work.path, work.tell, self.ray, self.device,
            self.time_limit,
        )  # fmt: skip

    def judge(self, model: Made, work: Work) -> Outcome:
        """Write the conformers."""
        from tiltflow.molecules.page import conformer_blocks
        from tiltflow.molecules.write import write_conformers, write_rejects

        made = model
        if self.alone and made.refused:
            raise TiltflowError(f"{self.input}: {made.refused[0].reason}.")
        write_conformers(work.path, made.found)
        write_rejects(work.path, made.rejects)
        untold = sum(row["reliable"] is False for row in made.rows)
        conformers = sum(row["conformers"] for row in made.rows)
        facts = {f"weights that cannot be told (ESS below {RELIABLE})": untold} if untold else {}
        return Outcome(
            title=f"{conformers} conformers of {len(made.found)} molecule{'' if len(made.found) == 1 else 's'}",
            summary={
                "molecules": len(made.found),
                "conformers": conformers,
                "rejected": sum(row["rejected"] for row in made.rows),
                "refused": len(made.refused),
                "unreliable": untold,
            },
            verdict=judge_conformers(made.rows),
            rows=[
                *({"kind": "conformers", **row} for row in made.rows),
                *({"kind": "refused", **r._asdict()} for r in made.refused),
            ],
            facts={"rejected": len(made.rejects), **facts},
            draw=lambda: (conformer_blocks(made.found, made.rejects), ()),
        )


@settings
class ConformerTrainingJob(ConformerTrainingConfig):
    """A run that trains one sampler for many molecules."""

    name: ClassVar[str] = "train-conformers"
    writes: ClassVar[tuple[str, ...]] = (MODEL,)

    @cached_property
    def chosen(self) -> list[Molecule]:
        """``molecules`` good ones of the input, in random order by the seed; what is refused is passed over.

        Raises:
            TiltflowError: no such file, or not one good molecule in it.
        """
        require_rdkit()
        import numpy as np

        from tiltflow.molecules.read import read_molecules

        path, order = Path(self.input), np.random.default_rng(self.seed)
        if kind(self.input) == "table":
            smiles = [row.smiles for row in rows(path)]
            found: list[Molecule] = []
            for i in order.permutation(len(smiles)):
                found += read_molecules(smiles[i], None, self.max_atoms).molecules
                if len(found) == self.molecules:
                    break
        else:
            every = read_molecules(self.input, None, self.max_atoms).molecules
            found = [every[i] for i in order.permutation(len(every))[: self.molecules]]
        if not found:
            raise TiltflowError(f"{path}: not one molecule of at most {self.max_atoms} atoms can be trained on.")
        return found

    def config(self) -> dict[str, Any]:
        """The fields as JSON, the input by its absolute path."""
        path = Path(self.input)
        return as_json(self) | {"input": str(path.resolve()) if path.exists() else self.input}

    @classmethod
    def read(cls, config: dict[str, Any], folder: Path) -> Self:
        """The job of a config.json."""
        fields = {k: v for k, v in config.items() if k not in ("job", "format")}
        return from_json(cls, fields, str(folder / "config.json"))

    @property
    def training(self) -> TorsionalSettings:
        """How it trains."""
        return self.settings.sampler

    def trial(self, training: Mapping[str, Any], share: float) -> tuple[Self, float]:
        """With other settings of the training, and a share of the molecules: as many at least as a round visits."""
        share = min(1.0, max(share, self.settings.visited / self.molecules))
        settings = replace(self.settings, sampler=replace(self.settings.sampler, **training))
        return replace(self, molecules=round(share * self.molecules), settings=settings), share

    def check(self) -> None:
        """Find misuse: the input, the energy."""
        _require_energies(self.chosen, self.settings.energy)

    def load(self, folder: Path, device: str = "cpu") -> Amortised:
        """The model of a finished run folder."""
        require_rdkit()
        from tiltflow.molecules.amortised import load_amortised

        return load_amortised(folder / MODEL, device)

    def train(self, work: Work) -> tuple[Amortised, int]:
        """Train, with checkpoints; returns the model and the number of its templates."""
        from tiltflow.molecules.amortised import prepare, train_amortised

        rounds = self.settings.sampler.rounds
        assert rounds is not None  # as the settings have checked
        prepared = prepare(self.chosen, self.settings, self.seed, partial(work.tell, "templates"))

        def report(row: dict[str, Any]) -> None:
            work.round(row, "training", rounds, f"energy {row['energy']:.1f} kT, ESS {row['ess']:.3f}")

        model = train_amortised(prepared, self.settings, self.seed, work.checkpoint, work.resume, report, self.device)
        return model, sum(len(one.templates) for one in prepared)

    def judge(self, model: tuple[Amortised, int], work: Work) -> Outcome:
        """Write the model."""
        from tiltflow.molecules.amortised import save_amortised

        trained, templates = model
        save_amortised(work.path / MODEL, trained)
        last = trained.history[-RECENT:]
        summary = {
            "molecules": len(trained.smiles),
            "templates": templates,
            "ess": mean(r["ess"] for r in last),
            "energy": mean(r["energy"] for r in last),
            "energy_calls": trained.history[-1]["energy_calls"],
            "model": MODEL,
        }
        return Outcome(
            title=f"one sampler of torsions for {len(trained.smiles)} molecules",
            summary=summary,
            verdict=None,
            history=trained.history,
            facts={name: summary[name] for name in ("molecules", "templates", "ess")},
            draw=lambda: ((), training_blocks(trained.history, SAMPLING)),
        )
