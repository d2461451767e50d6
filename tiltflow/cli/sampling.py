"""Commands of the second job: train a sampler of an energy, check an energy; and draw from any finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltflow.cli.common import cell, common, document, finish, finish_run, require_new, run_job, table
from tiltflow.cli.options import given, options, run_options, trust_option
from tiltflow.sampling.settings import AutomaticConfig, AutomaticSettings, SamplerConfig, SamplerSettings

if TYPE_CHECKING:
    from tiltflow.sampling.job import SamplerJob

CHECKED = ("shape", "space", "scale", "finest")
"""Fields of a sampler that a check of its energy needs too."""


def _run(job: Any, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool) -> None:
    """Run a job on an energy, and print its numbers and its verdict."""
    from tiltflow.report.tables import sampler_numbers

    result = run_job(job, out, resume, overwrite, log)
    numbers = [{"": r.name, **r._asdict()} for r in sampler_numbers(result["rows"][0], job.load_problem().log_z)]
    finish_run(result, out, numbers, ["", "value", "floor", "resampled"], as_json)


def sampler_job(problem: str, **values: Any) -> SamplerJob:
    """The job of the command's options."""
    fields = {"problem": problem, **given(values, SamplerConfig)}
    named = SamplerConfig(**fields)
    wanted = given(values, SamplerSettings)
    SamplerSettings.of(named.method, {}, **wanted)
    from tiltflow.sampling.job import SamplerJob

    suited = SamplerJob(**fields).load_problem().settings
    return SamplerJob(**fields, settings=SamplerSettings.of(named.method, suited, **wanted))


@click.command("train-sampler")
@click.argument("problem")
@options(SamplerConfig, SamplerSettings, leave=("problem", "settings"))
@run_options
def train_sampler_command(
    problem: str, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool, **values: Any
) -> None:
    """Learn to sample e^{−E}; leave a run folder with weights, samples, metrics, report and verdict.

    PROBLEM is a name such as gmm40 or dw4, or module:function (file.py:function) that is or returns an EnergyProblem, or
    an energy (x) → (B,) in kT, then with --shape, --scale and --finest.
    """
    _run(sampler_job(problem, **values), out, resume, overwrite, log, as_json)


@click.command("sample-energy")
@click.argument("problem")
@options(AutomaticConfig, AutomaticSettings, leave=("problem", "settings"))
@run_options
def sample_energy_command(
    problem: str, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool, **values: Any
) -> None:
    """Sample e^{−E} without training: samples, log Z and its error, a verdict, a report.

    PROBLEM as for train-sampler. A population is annealed, a mixture fitted to it, and its draws are weighted exactly.
    An interrupted run starts again.
    """
    fields = {"problem": problem, **given(values, AutomaticConfig)}
    AutomaticConfig(**fields)
    asked = AutomaticSettings(**given(values, AutomaticSettings))
    from tiltflow.sampling.job import AutomaticJob

    _run(AutomaticJob(**fields, settings=asked), out, resume, overwrite, log, as_json)


@click.command("check-energy")
@click.argument("problem")
@options(SamplerConfig, leave=tuple(f for f in SamplerConfig.__dataclass_fields__ if f not in CHECKED))
@click.option("--samples", type=click.IntRange(32), default=2_000, show_default=True, help="Configurations to try.")
@common
def check_energy_command(problem: str, samples: int, seed: int, device: str, as_json: bool, **values: Any) -> None:
    """Is an energy fit to sample from? PROBLEM as for train-sampler.

    Tried on its reference samples or exact draws if it has any, and then also on the virial identity; else on draws of the
    base process N(0, SCALE²).
    """
    fields = {"problem": problem, **given(values, SamplerConfig)}
    SamplerConfig(**fields)
    import torch

    from tiltflow.core.device import companion
    from tiltflow.core.geometry import Torus
    from tiltflow.energies.problem import base_draws
    from tiltflow.run.device import check_device
    from tiltflow.sampling.assess import reference_samples
    from tiltflow.sampling.job import SamplerJob, symmetries
    from tiltflow.verdict.check_energy import check_energy

    device, loaded = check_device(device), SamplerJob(**fields).load_problem()
    generator = torch.Generator().manual_seed(seed)
    x = reference_samples(loaded, samples, generator)
    where = "base" if x is None else "reference"
    x = base_draws(loaded, samples, generator) if x is None else x
    generator = companion(generator, torch.device(device))
    found = check_energy(
        loaded.energy, x.to(device), geometry=loaded.geometry, generator=generator, **symmetries(loaded),
        equilibrium=where == "reference" and not isinstance(loaded.geometry, Torus),
    )  # fmt: skip
    lines = [{"kind": "check", "where": where, **line._asdict()} for line in found.lines]
    text = table(lines, ["status", "name", "value", "threshold", "explanation"])
    text += f"\n\ntried on {len(x)} {'samples of the target' if where == 'reference' else 'draws of the base process'}"
    finish(document(seed, device, lines, found.status), as_json, f"{text}\nverdict: {found.status}")


@click.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1, 10_000_000), default=64, show_default=True, help="How many samples.")
@click.option("--noise", help="Of a fine-tuned run: chain (as trained; default), ode, memoryless, or a σ such as 0.5.")
@click.option("--steps", type=click.IntRange(1, 100_000), help="Of a fine-tuned run (default: those of the training).")
@click.option("--ode-method", help="Of a fine-tuned run: euler, heun (default), or torchdiffeq's (dopri5).")
@click.option("--exact", is_flag=True, help="Of a fine-tuned run: weigh paths by their path weights and resample.")
@click.option("--out", type=click.Path(path_type=Path), help="FILE.safetensors (default: RUN/drawn.safetensors).")
@click.option("--base", help="The base, in place of what the run names, as for finetune.")
@click.option("--reward", help="The reward, in place of what the run names.")
@click.option("--conditions", help="What draws conditions, in place of what the run names.")
@click.option("--problem", help="The problem, in place of what the run names, as for train-sampler.")
@trust_option
@common
def sample_command(
    run: Path, count: int, noise: str | None, steps: int | None, ode_method: str | None, exact: bool, out: Path | None,
    trust: bool, seed: int, device: str, as_json: bool, **named: str | None,
) -> None:  # fmt: skip
    """Draw from a run folder: of finetune by any noise or exactly, of train-sampler with energies and path weights.

    Code that the folder names is imported only if it is given again, or with --trust: a folder may come from anybody.
    """
    target = out or run / "drawn.safetensors"
    require_new(target)
    from tiltflow.run.device import check_device
    from tiltflow.run.draw import draw_from_run

    asked = {"noise": noise, "steps": steps, "method": ode_method, "exact": exact or None}
    how = {k: v for k, v in asked.items() if v is not None}
    code = {k: v for k, v in named.items() if v is not None}
    row = draw_from_run(run, target, count, how, seed, check_device(device), trust, code)
    numbers = [f"{name} {cell(row[name])}" for name in ("reward", "median_energy", "ess") if row.get(name) is not None]
    finish(document(seed, device, [row], None), as_json, f"{target}  {row['shape']}  {'  '.join(numbers)}")
