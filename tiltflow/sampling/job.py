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
from tiltflow.core.geometry import Centred
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.core.weights import ess
from tiltflow.energies import EnergyProblem
from tiltflow.energies.problem import base_draws
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.sampling.model import WEIGHTS, Sampler
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.outcome import outcome, tensors_of
from tiltflow.sampling.settings import SamplerConfig
from tiltflow.sampling.train import require_trained, train_sampler, untrained
from tiltflow.train.store import load_weights
from tiltflow.verdict.check_energy import check_energy

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
        row, problem = require_trained(self.method), self.load_problem()
        sampler, _ = untrained(problem, row, self.settings, self.seed)
        generator = torch.Generator(self.device).manual_seed(self.seed)
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
        row = require_trained(self.method)
        sampler, _ = untrained(problem or self.load_problem(), row, self.settings, self.seed, device=device)
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
            device=self.device,
            checkpoint=work.checkpoint,
            resume=work.resume,
            callback=lambda row: work.round(row, "training", self.settings.rounds, live(row)),
        )
        sampler.save_weights(work.path)
        return outcome(sampler, self.samples, self.compared, self.seed, notes, work.tell)


def symmetries(problem: EnergyProblem) -> dict[str, bool]:
    """What the network takes for granted of the energy: arguments of ``check_energy``."""
    if not isinstance(problem.geometry, Centred):
        return {}
    return {"rotation": problem.identical, "permutation": problem.identical}


def live(row: dict[str, Any]) -> str:
    """The energies of a training round in a few characters."""
    shown = {"E": row.get("energy"), "ESS": row.get("ess"), "T": row.get("temperature")}
    return ", ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None and not (k == "T" and v == 1))


def _present(problem: EnergyProblem) -> tuple[EnergyProblem, list[str]]:
    """The problem without its stored reference if that is missing here, and a note that says so."""
    if problem.reference is None or problem.sample is not None:
        return problem, []
    try:
        problem.reference()
    except TiltflowError as error:
        return replace(problem, reference=None), [f"No comparison with reference samples: {error}"]
    return problem, []
