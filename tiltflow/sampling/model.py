"""A trained sampler of e^{−E}."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiltflow.core.brownian import NoiseChain
from tiltflow.core.control import DriftControl
from tiltflow.core.settings import as_json
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.run.job import report
from tiltflow.run.open import save_model
from tiltflow.sampling.drawn import Drawn, draw
from tiltflow.sampling.outcome import outcome
from tiltflow.sampling.settings import EVIDENCE, SamplerSettings
from tiltflow.train.store import save_weights
from tiltflow.verdict.line import Verdict

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Sampler:
    """The learned control on the chain that it is drawn with.

    Args:
        problem: What it samples.
        method: What it was trained by.
        settings: How it was trained.
        chain: The base, on the grid of finished samples.
        control: What was learned.
        energy: The evaluator, which counts every evaluation.
        history: One dict per round of training.
    """

    problem: EnergyProblem
    method: str
    settings: SamplerSettings
    chain: NoiseChain
    control: DriftControl
    energy: Evaluator
    history: list[dict[str, Any]]

    def sample(self, n: int, seed: int = 0, batch: int = 2_000) -> Drawn:
        """n samples with energies, and with log path weights where the source is a point, or the base stationary."""
        return draw(self.chain, self.control, self.energy, n, torch.Generator(self.device).manual_seed(seed), batch)

    @property
    def device(self) -> torch.device:
        """Where its network lives."""
        return next(self.control.module.parameters()).device

    def verdict(
        self, samples: int = 10_000, compared: int = 2_000, seed: int = 0, evidence: int = EVIDENCE
    ) -> Verdict:
        """The verdict on so many samples, of which so many are compared with the problem's reference, if it has one.

        ``evidence``: energies at most for an independent classical run, if it has none.
        """
        found = outcome(self, samples, compared, evidence, seed).verdict
        assert found is not None
        return found

    def report(
        self,
        folder: Path | str,
        samples: int = 10_000,
        compared: int = 2_000,
        seed: int = 0,
        evidence: int = EVIDENCE,
    ) -> Path:
        """Write ``folder/report.html``: the verdict, samples beside the reference, path weights. Returns its path."""
        judged = outcome(self, samples, compared, evidence, seed)
        return report(judged, folder, {"method": self.method, **as_json(self.settings)})

    def save(self, folder: Path | str) -> Path:
        """Write the sampler into a new folder, for :func:`tiltflow.load` with ``problem=``.

        Raises:
            TiltflowError: the folder exists and is not empty, or the method is not one of the table.
        """
        config = {"problem": None, "settings": as_json(self.settings)}
        return save_model(folder, "train-sampler", self.method, self.save_weights, **config)

    def save_weights(self, folder: Path) -> None:
        """The network, as safetensors."""
        save_weights(folder / WEIGHTS, self.control.module)
