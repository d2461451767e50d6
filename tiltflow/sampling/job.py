"""The second job, from a name to a run folder: train a sampler of an energy, draw, assess, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, samples.safetensors, metrics.json, report.html.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus, noise
from tiltflow.core.weights import ess, normalised
from tiltflow.energies import EnergyProblem, virial
from tiltflow.report import Figures, Page, gallery, training_blocks, write_page
from tiltflow.report.figures import SAMPLING, distance_figures, energy_figures, weight_figures
from tiltflow.report.tables import sampler_table
from tiltflow.run.folder import RunFolder, document
from tiltflow.sampling.assess import assess, from_both_sides, polished, reference_samples
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.sampler import DEFAULTS, Drawn, SamplerSettings, TrainedSampler, train_sampler
from tiltflow.train.store import load_weights, save_weights
from tiltflow.verdict.check_energy import check_energy
from tiltflow.verdict.line import Verdict
from tiltflow.verdict.sampler import judge_sampler

Progress = Callable[[str, int, int, str], None]
WEIGHTS, SAMPLES = "weights.safetensors", "samples.safetensors"
TRIAL, EVALUATION_SEED, SAMPLE_SEED = 64, 10_000, 20_000


@dataclass(frozen=True)
class SamplerConfig:
    """Everything a sampler run depends on; the run folder's config.json.

    Args:
        problem, shape, space: see :func:`tiltflow.sampling.names.load_problem`; scale and finest are those of the settings.
        seed, device: as usual.
        samples: drawn from the result. compared: rows of them that distances to the reference are computed on.
        settings: of :func:`tiltflow.sampling.sampler.train_sampler`.
    """

    problem: str
    shape: tuple[int, ...] | None = None
    space: str = "vectors"
    seed: int = 0
    device: str = "cpu"
    samples: int = 10_000
    compared: int = 2_000
    settings: SamplerSettings = field(default_factory=SamplerSettings)

    def load_problem(self) -> EnergyProblem:
        """The problem by its name."""
        return load_problem(self.problem, self.shape, self.space, self.settings.scale, self.settings.finest)

    def untrained(self, problem: EnergyProblem) -> TrainedSampler:
        """The sampler before training: its chain and a network with the initial weights; no energy is evaluated."""
        built = train_sampler(problem, replace(self.settings, iterations=0), seed=self.seed)
        return replace(built, settings=self.settings)

    def check(self, problem: EnergyProblem) -> None:
        """Find misuse before anything is written: settings, and what the energy returns where the base process ends.

        Raises:
            TiltflowError: naming the setting, or the question of ``check_energy`` that the energy fails.
        """
        for part in (self, self.settings):
            for item in fields(part):
                value = getattr(part, item.name)
                if type(value) is int and item.name != "seed" and value < 1:
                    raise TiltflowError(f"{item.name} must be at least 1, got {value}.")
                if item.name in ("scale", "finest") and value is not None and not 0 < value < float("inf"):
                    raise TiltflowError(f"{item.name} is a length: positive and finite, not {value}.")
        if self.device != "cpu":
            raise TiltflowError(f"device {self.device!r}: samplers are trained on the CPU; leave --device out.")
        trained = self.untrained(problem)
        generator = torch.Generator().manual_seed(self.seed)
        report = check_energy(
            problem.energy,
            base_draws(problem, TRIAL, generator, trained.chain.end_variance**0.5),
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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> SamplerConfig:
        """The config of a sampler's run folder. Raises TiltflowError if there is none."""
        if not is_sampler_run(folder):
            raise TiltflowError(f"{folder} is not the run folder of a sampler: it has no config.json with a problem.")
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = tuple(saved["shape"]) if saved["shape"] else None
        return cls(**(saved | {"shape": shape, "settings": SamplerSettings(**saved["settings"])}))


def default_settings(problem: str) -> SamplerSettings:
    """The settings that suit a problem, by its name."""
    return DEFAULTS.get(problem, SamplerSettings())


def is_sampler_run(folder: Path) -> bool:
    """Whether the folder's config.json is that of a sampler."""
    path = folder / "config.json"
    return path.is_file() and "problem" in json.loads(path.read_text(encoding="utf-8"))


def base_draws(problem: EnergyProblem, n: int, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """n draws of N(0, scale²) on the problem's space (None: its own scale): where an untrained sampler goes."""
    zeros = torch.zeros(n, *problem.event_shape)
    return problem.geometry.wrap((scale or problem.scale) * noise(problem.geometry, zeros, generator))


def symmetries(problem: EnergyProblem) -> dict[str, bool]:
    """What the network takes for granted of the energy: arguments of ``check_energy``."""
    if not isinstance(problem.geometry, Centred):
        return {}
    return {"rotation": problem.identical, "permutation": problem.identical}


def load_sampler(folder: Path) -> tuple[SamplerConfig, TrainedSampler]:
    """The config and the trained sampler of a finished run folder."""
    config = SamplerConfig.read(folder)
    trained = config.untrained(config.load_problem())
    load_weights(folder / WEIGHTS, trained.control.module)
    return config, trained


def draw_from_sampler(run: Path, out: Path, n: int, seed: int, device: str) -> dict[str, Any]:
    """Draw n new samples of a run folder into a safetensors file (x, energy, log_weights); returns a row about them.

    Raises:
        TiltflowError: the file exists, a run that is not finished, n < 1, another device than the CPU.
    """
    if out.exists():
        raise TiltflowError(f"{out} exists; give another file with --out.")
    if device != "cpu" or n < 1:
        raise TiltflowError(f"samplers draw at least one sample, on the CPU; got n = {n} on {device!r}.")
    trained = load_sampler(run)[1]
    drawn = trained.draw(n, seed=SAMPLE_SEED + seed)
    save_drawn(out, drawn)
    return {
        "run": str(run),
        "out": str(out),
        "shape": list(drawn.x.shape),
        "median_energy": float(drawn.energy.median()),
        "ess": None if drawn.log_weights is None else ess(drawn.log_weights),
        "rejected": int(torch.isinf(drawn.energy).sum()),
    }


class Assessed(NamedTuple):
    """The row of numbers, and the reference samples they were compared with (None: there are none)."""

    row: dict[str, Any]
    reference: Tensor | None


def assess_all(
    problem: EnergyProblem, drawn: Drawn, trained: TrainedSampler | None, generator: torch.Generator, compared: int
) -> Assessed:
    """All that can be said of drawn samples: distances, path weights from both sides, and without a reference the virial.

    ``compared`` is lowered to what the samples and the reference suffice for. Raises what the problem's reference raises.
    """
    n = min(compared, len(drawn.x))
    reference = reference_samples(problem, 2 * n, generator)
    if reference is not None:
        reference = reference.to(drawn.x)
        n = min(n, len(reference) // 2)
    row = {"compared": n if reference is not None else 0} | assess(problem, drawn, reference, generator, n)
    if reference is not None and trained is not None:
        row |= from_both_sides(trained, reference, generator)
        row |= polished(problem, drawn, reference, generator, n)
    if reference is None and not isinstance(problem.geometry, Torus):
        found = virial(problem.energy, drawn.x[torch.isfinite(drawn.energy)])
        row |= {"virial": found.mean, "virial_std": found.standard_error}
        row["dimension"] = problem.geometry.dimension(problem.event_shape)
    return Assessed(row, reference)


def live(row: dict[str, Any]) -> str:
    """The energies of a training round in a few characters."""
    shown = {"E": row.get("energy"), "ESS": row.get("ess"), "T": row.get("temperature")}
    return ", ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None and not (k == "T" and v == 1))


def run_sampler(
    config: SamplerConfig, folder: RunFolder, command: str, progress: Progress = lambda what, done, total, note: None
) -> dict[str, Any]:
    """Run the whole job inside an opened run folder; returns the document that metrics.json holds.

    ``progress(what, done, total, note)`` is called as the stages advance. Raises what :func:`train_sampler` raises.
    """
    started = time.perf_counter()
    problem, total = config.load_problem(), config.settings.iterations
    problem, notes = _present(problem)
    trained = train_sampler(
        problem,
        config.settings,
        seed=config.seed,
        checkpoint=folder.checkpoint,
        resume=folder.resume,
        callback=lambda row: progress("training", row["iteration"] + 1, total, live(row)),
    )
    save_weights(folder.path / WEIGHTS, trained.control.module)
    spent = {f"energy_{name}": count for name, count in trained.energy.report().items()}
    progress("samples and distances", 0, 1, "")
    drawn = trained.draw(config.samples, seed=EVALUATION_SEED + config.seed)
    save_drawn(folder.path / SAMPLES, drawn)
    generator = torch.Generator().manual_seed(EVALUATION_SEED + config.seed)
    assessed = assess_all(problem, drawn, trained, generator, config.compared)
    verdict = judge_sampler(assessed.row)
    progress("samples and distances", 1, 1, "")
    history = [{k: v for k, v in h.items() if not isinstance(v, list)} for h in trained.history]
    summary = {
        "kind": "summary",
        "problem": problem.name,
        "method": config.settings.method,
        **assessed.row,
        "median_energy": float(drawn.energy.median()),
        **spent,
        "train_seconds": sum(h["seconds"] for h in history),
        "seconds": time.perf_counter() - started,
    }
    lines = ({"kind": "verdict", **line._asdict()} for line in verdict.lines)
    rows = [summary, *lines, *({"kind": "iteration"} | h for h in history)]
    result = document(command, config.seed, config.device, rows, verdict.status)
    folder.write_json("metrics.json", result)
    write_page(folder.path, _page(config, command, problem, drawn, assessed, verdict, history, notes))
    return result


def save_drawn(path: Path, drawn: Drawn) -> None:
    """x, energy and, if there are any, log_weights, as safetensors."""
    tensors = {"x": drawn.x, "energy": drawn.energy, "log_weights": drawn.log_weights}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


def _present(problem: EnergyProblem) -> tuple[EnergyProblem, list[str]]:
    """The problem without its stored reference if that is missing here, and a note that says so."""
    if problem.reference is None or problem.sample is not None:
        return problem, []
    try:
        problem.reference()
    except TiltflowError as error:
        return replace(problem, reference=None), [f"No comparison with reference samples: {error}"]
    return problem, []


def _page(
    config: SamplerConfig, command: str, problem: EnergyProblem, drawn: Drawn, assessed: Assessed, verdict: Verdict,
    history: list[dict[str, Any]], notes: list[str],
) -> Page:  # fmt: skip
    row, reference = assessed
    energy = None if reference is None else problem.energy(reference).detach()
    particles = isinstance(problem.geometry, Centred)
    sets, median = {"Samples": drawn.x, "Reference": reference}, None if energy is None else float(energy.median())
    laws = energy_figures({"samples": drawn.energy, "reference": energy})
    laws += distance_figures({"samples": drawn.x, "reference": reference}) if particles else []
    laws += weight_figures(None if drawn.log_weights is None else normalised(drawn.log_weights))
    levels = {"energy": {"reference": median}, "log_z": {"reference": problem.log_z}}
    return Page(
        title=f"{problem.name}, sampled by {config.settings.method}",
        command=command,
        verdict=verdict,
        blocks=[gallery(sets, particles=particles), Figures("", laws), sampler_table(row, problem.log_z)],
        training=training_blocks(history, SAMPLING, levels),
        facts={"path ESS, of 1": row["ess"]} if row.get("ess") is not None else {},
        history=history,
        config=asdict(config) | asdict(config.settings),
        notes=notes,
        version=__version__,
    )
