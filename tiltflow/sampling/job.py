"""The second job, from a name to a run folder: sample an energy by stages, or train a sampler of it; assess, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, samples.safetensors, metrics.json, report.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.core.weights import ess
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.energies.cluster import Cluster, ClusterEnergy
from tiltflow.energies.problem import base_draws
from tiltflow.run.device import check_device
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.sampling.automatic import Sampled, sample
from tiltflow.sampling.model import WEIGHTS, Sampler
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.outcome import outcome, tensors_of
from tiltflow.sampling.settings import AutomaticConfig, SamplerConfig, SamplerSettings
from tiltflow.sampling.train import require_trained, train_sampler, untrained
from tiltflow.train.distributed import world
from tiltflow.train.store import load_weights
from tiltflow.verdict.check_energy import check_energy

TRIAL = 64


class Named:
    """A job on an energy that its config names; see :class:`~tiltflow.sampling.settings.EnergyConfig`."""

    if TYPE_CHECKING:  # the kinds that are checked are the config's
        problem: str | None
        shape: tuple[int, ...] | None
        space: str
        scale: float | None
        finest: float | None

    def config(self) -> dict[str, Any]:
        """The fields as JSON, but for who did the work; a file by its absolute path."""
        fields = {name: value for name, value in as_json(self).items() if name != "ray"}
        return fields | ({} if self.problem is None else {"problem": anchored(self.problem)})

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


@settings
class SamplerJob(Named, SamplerConfig):
    """A run that trains a sampler."""

    name: ClassVar[str] = "train-sampler"
    writes: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    @property
    def training(self) -> SamplerSettings:
        """How it trains."""
        return self.settings

    def trial(self, training: Mapping[str, Any], share: float) -> tuple[Self, float]:
        """With other settings of the training, and a share of the samples: those at least that are compared."""
        share = min(1.0, max(share, self.compared / self.samples))
        return replace(self, samples=round(share * self.samples), settings=replace(self.settings, **training)), share

    def check(self) -> None:
        """Find misuse: the method, and what the energy returns where the base process ends.

        Raises:
            TiltflowError: naming the setting, or the question of ``check_energy`` that the energy fails.
        """
        row, problem = require_trained(self.method), self.load_problem()
        row.require_training(self.settings.buffer_rounds, self.settings.accumulate, self.settings.batch)
        if self.ray is not None:
            Cluster(self.ray)  # is one there?
        sampler, _ = untrained(problem, row, self.settings, self.seed)
        generator = torch.Generator(check_device(self.device)).manual_seed(self.seed)
        require_energy(problem, sampler.chain.end_variance**0.5, generator)

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

    def train(self, work: Work) -> Sampler:
        """Train on the energy."""
        problem = _present(self.load_problem())[0]
        energy = problem.energy if self.ray is None else ClusterEnergy(problem.energy, Cluster(self.ray))
        return train_sampler(
            problem,
            self.method,
            self.settings,
            seed=self.seed,
            energy=Evaluator(energy),
            device=self.device,
            checkpoint=work.checkpoint,
            resume=work.resume,
            callback=lambda row: work.round(row, "training", self.settings.rounds, live(row)),
        )

    def judge(self, model: Sampler, work: Work) -> Outcome:
        """Save, draw, assess."""
        model.save_weights(work.path)
        notes = _present(self.load_problem())[1]
        return outcome(model, self.samples, self.compared, self.evidence, self.seed, notes, work.tell)


@settings
class AutomaticJob(Named, AutomaticConfig):
    """A run that samples an energy by stages, without training."""

    name: ClassVar[str] = "sample-energy"
    writes: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Find misuse: what the energy returns where the population starts."""
        if world().size > 1:
            raise TiltflowError("sample-energy trains nothing that processes could share: run it in one process.")
        problem = self.load_problem()
        require_energy(problem, problem.scale, torch.Generator(check_device(self.device)).manual_seed(self.seed))

    def train(self, work: Work) -> Sampled:
        """Sample: nothing is trained."""
        problem = _present(self.load_problem())[0]
        return sample(problem, self.samples, self.settings, seed=self.seed, device=self.device, tell=work.tell)

    def judge(self, model: Sampled, work: Work) -> Outcome:
        """Assess."""
        return model.outcome(self.compared, self.evidence, self.seed, _present(self.load_problem())[1], work.tell)


def require_energy(problem: EnergyProblem, scale: float, generator: torch.Generator) -> None:
    """What the energy returns for draws of N(0, scale²).

    Raises:
        TiltflowError: naming the question of ``check_energy`` that the energy fails.
    """
    x = base_draws(problem, TRIAL, generator, scale)
    report = check_energy(problem.energy, x, geometry=problem.geometry, generator=generator, **symmetries(problem))
    for line in report.lines:
        if line.status == "fail" and line.name != "spread":  # far out, energies may span many decades
            raise TiltflowError(
                f"the energy fails the check {line.name!r} ({line.threshold}) on {TRIAL} draws of the base process: "
                f"{line.explanation}. All checks: tiltflow check-energy."
            )


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
