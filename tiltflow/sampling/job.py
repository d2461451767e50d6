"""The second job, from a name to a run folder: train a sampler of an energy, draw, assess, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, samples.safetensors, metrics.json, report.html.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, noise
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.core.weights import ess, normalised
from tiltflow.energies import EnergyProblem
from tiltflow.methods.registry import row_of
from tiltflow.report import Figures, gallery, training_blocks
from tiltflow.report.figures import SAMPLING, distance_figures, energy_figures, weight_figures
from tiltflow.report.page import Block
from tiltflow.report.tables import sampler_table
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.sampling.assess import Assessed, assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.model import EVALUATION_SEED, WEIGHTS, Sampler
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.settings import SamplerConfig
from tiltflow.sampling.train import train_sampler, untrained
from tiltflow.train.store import load_weights
from tiltflow.verdict.check_energy import check_energy
from tiltflow.verdict.sampler import judge_sampler

TRIAL = 64


@settings
class SamplerJob(SamplerConfig):
    """A run that trains a sampler."""

    name: ClassVar[str] = "train-sampler"

    def config(self) -> dict[str, Any]:
        """The fields as JSON; a file by its absolute path."""
        return as_json(self) | ({} if self.problem is None else {"problem": anchored(self.problem)})

    @classmethod
    def read(cls, config: dict[str, Any], folder: Path) -> Self:
        """The job of a config.json."""
        fields = {k: v for k, v in config.items() if k not in ("job", "format")}
        return from_json(cls, fields, str(folder / "config.json"))

    def load_problem(self) -> EnergyProblem:
        """The problem by its name."""
        if self.problem is None:
            raise TiltflowError("this run was saved from Python: give its problem, load(folder, problem=…).")
        return load_problem(self.problem, self.shape, self.space, self.scale, self.finest)

    def check(self) -> None:
        """Find misuse: the method, and what the energy returns where the base process ends.

        Raises:
            TiltflowError: naming the setting, or the question of ``check_energy`` that the energy fails.
        """
        row, problem = row_of(self.method, "sample"), self.load_problem()
        if self.device != "cpu":
            raise TiltflowError(f"device {self.device!r}: samplers are trained on the CPU; leave --device out.")
        sampler, _ = untrained(problem, row, self.settings, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        report = check_energy(
            problem.energy,
            base_draws(problem, TRIAL, generator, sampler.chain.end_variance**0.5),
            geometry=problem.geometry,
            generator=generator,
            **symmetries(problem),
        )
        for line in report.lines:
            if line.status == "fail" and line.name != "spread":  # far out, energies may span many decades
                raise TiltflowError(
                    f"the energy fails the check {line.name!r} ({line.threshold}) on {TRIAL} draws of the base process: "
                    f"{line.explanation}. All checks: tiltflow check-energy."
                )

    def load(self, folder: Path, device: str = "cpu", problem: EnergyProblem | None = None) -> Sampler:
        """The sampler of a finished run folder; ``problem`` replaces the one that it names."""
        if device != "cpu":
            raise TiltflowError(f"device {device!r}: samplers run on the CPU; leave --device out.")
        row = row_of(self.method, "sample")
        sampler, _ = untrained(problem or self.load_problem(), row, self.settings, self.seed)
        load_weights(folder / WEIGHTS, sampler.control.module)
        return sampler

    def draw(
        self, folder: Path, n: int, asked: dict[str, Any], seed: int, device: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """n new samples with energies and path weights, and what they say."""
        if asked:
            others = ", ".join(asked)
            raise TiltflowError(f"{folder} is a sampler's run, which has one noise and one grid: leave out {others}.")
        drawn = self.load(folder, device).sample(n, seed)
        return tensors_of(drawn), {
            "median_energy": float(drawn.energy.median()),
            "ess": None if drawn.log_weights is None else ess(drawn.log_weights),
            "rejected": int(torch.isinf(drawn.energy).sum()),
        }

    def perform(self, work: Work) -> Outcome:
        """Train, save, draw, assess."""
        problem, notes = _present(self.load_problem())
        sampler = train_sampler(
            problem,
            self.method,
            self.settings,
            seed=self.seed,
            checkpoint=work.checkpoint,
            resume=work.resume,
            callback=lambda row: work.round(row, "training", self.settings.rounds, live(row)),
        )
        sampler.save_weights(work.path)
        spent = {f"energy_{name}": count for name, count in sampler.energy.report().items()}
        work.tell("samples", 0, self.samples, "")
        drawn = sampler.sample(self.samples, EVALUATION_SEED + self.seed)
        work.tell("samples", self.samples, self.samples, "")
        work.tell("distances", 0, 1, "")
        generator = torch.Generator().manual_seed(EVALUATION_SEED + self.seed)
        assessed = assess_all(problem, drawn, sampler.chain, sampler.control, generator, self.compared)
        work.tell("distances", 1, 1, "")
        row = assessed.row
        return Outcome(
            title=f"{problem.name}, sampled by {self.method}",
            summary={
                "problem": problem.name,
                "method": self.method,
                **row,
                "median_energy": float(drawn.energy.median()),
                **spent,
                "train_seconds": sum(h["seconds"] for h in sampler.history),
            },
            verdict=judge_sampler(row),
            tensors=tensors_of(drawn),
            history=sampler.history,
            facts={"path ESS, of 1": row["ess"]} if row.get("ess") is not None else {},
            notes=notes,
            draw=lambda: _blocks(problem, sampler, drawn, assessed),
        )


def base_draws(problem: EnergyProblem, n: int, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """n draws of N(0, scale²) on the problem's space (None: its own scale): where an untrained sampler goes."""
    zeros = torch.zeros(n, *problem.event_shape)
    return problem.geometry.wrap((scale or problem.scale) * noise(problem.geometry, zeros, generator))


def symmetries(problem: EnergyProblem) -> dict[str, bool]:
    """What the network takes for granted of the energy: arguments of ``check_energy``."""
    if not isinstance(problem.geometry, Centred):
        return {}
    return {"rotation": problem.identical, "permutation": problem.identical}


def live(row: dict[str, Any]) -> str:
    """The energies of a training round in a few characters."""
    shown = {"E": row.get("energy"), "ESS": row.get("ess"), "T": row.get("temperature")}
    return ", ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None and not (k == "T" and v == 1))


def tensors_of(drawn: Drawn) -> dict[str, Tensor]:
    """x, energy and, if there are any, log_weights."""
    return {name: value for name, value in drawn._asdict().items() if value is not None}


def _present(problem: EnergyProblem) -> tuple[EnergyProblem, list[str]]:
    """The problem without its stored reference if that is missing here, and a note that says so."""
    if problem.reference is None or problem.sample is not None:
        return problem, []
    try:
        problem.reference()
    except TiltflowError as error:
        return replace(problem, reference=None), [f"No comparison with reference samples: {error}"]
    return problem, []


def _blocks(
    problem: EnergyProblem, sampler: Sampler, drawn: Drawn, assessed: Assessed
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    row, reference = assessed
    energy = None if reference is None else problem.energy(reference).detach()
    particles = isinstance(problem.geometry, Centred)
    sets, median = {"Samples": drawn.x, "Reference": reference}, None if energy is None else float(energy.median())
    laws = energy_figures({"samples": drawn.energy, "reference": energy})
    laws += distance_figures({"samples": drawn.x, "reference": reference}) if particles else []
    laws += weight_figures(None if drawn.log_weights is None else normalised(drawn.log_weights))
    levels = {"energy": {"reference": median}, "log_z": {"reference": problem.log_z}}
    blocks: list[Block] = [gallery(sets, particles=particles), Figures("", laws), sampler_table(row, problem.log_z)]
    return blocks, training_blocks(sampler.history, SAMPLING, levels)
