"""Commands of the second job: train a sampler of an energy, check an energy; and draw from a run of either job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from tiltflow.cli.common import (
    Bars,
    cell,
    check_device,
    command_line,
    common,
    document,
    finish,
    finish_run,
    parse_shape,
    table,
)
from tiltflow.core.errors import TiltflowError


def energy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to describe an energy that is no whole problem."""
    for option in (
        click.option("--torus", is_flag=True, help="An own energy is of angles in [−π, π)."),
        click.option("--particles", is_flag=True, help="An own energy is of identical particles, --shape N,m, centred."),
        click.option("--finest", type=float, help="Finest detail of the target (own energies; else the problem's)."),
        click.option("--scale", type=float, help="Spread of the target (own energies; else the problem's)."),
        click.option("--shape", help="Shape of one x of an own energy, e.g. 2 or 13,3."),
    ):
        command = option(command)
    return command


def parse_space(particles: bool, torus: bool) -> str:
    """The name of the state space."""
    if particles and torus:
        raise TiltflowError("--particles and --torus exclude each other; give one.")
    return "particles" if particles else "torus" if torus else "vectors"


@click.command("train-sampler")
@click.argument("problem")
@energy_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option("--method", help="How to train; see docs/sampling.md (default, as below: the problem's).")
@click.option("--rounds", type=int, help="Rounds of simulation and energy evaluation.")
@click.option("--batch", type=int, help="End points per round.")
@click.option("--gradient-steps", type=int, help="Gradient steps per round.")
@click.option("--steps", type=int, help="Simulation steps K in training.")
@click.option("--draw-steps", type=int, help="Simulation steps of finished samples.")
@click.option("--learning-rate", type=float)
@click.option("--noise", help="geometric or constant.")
@click.option("--minimum-ess", type=float, help="Path weights are tempered to this share of effective samples.")
@click.option("--max-grad-norm", type=float, help="Clip of the energy's gradient (of each particle).")
@click.option("--hot", type=float, help="Temperature of the first round, cooled to 1.")
@click.option("--hidden", type=int, help="Width of the network.")
@click.option("--layers", type=int, help="Depth of the network.")
@click.option("--samples", default=10_000, show_default=True, help="Samples to draw and judge.")
@common
def train_sampler_command(
    problem: str, shape: str | None, particles: bool, torus: bool, out: Path, resume: bool, overwrite: bool,
    samples: int, seed: int, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Learn to sample e^{−E}; leave a run folder with weights, samples, metrics, report and verdict.

    PROBLEM is a name such as gmm40 or dw4, or module:function (file.py:function) that is or returns an EnergyProblem, or
    an energy (x) → (B,) in kT, then with --shape, --scale and --finest.
    """
    from tiltflow.report.tables import sampler_numbers
    from tiltflow.run.folder import RunFolder
    from tiltflow.sampling.job import SamplerConfig, default_settings, run_sampler

    given = {name: value for name, value in options.items() if value is not None}
    settings = replace(default_settings(problem), **given)
    config = SamplerConfig(
        problem, parse_shape(shape), parse_space(particles, torus), seed, check_device(device), samples, settings=settings
    )
    loaded = config.load_problem()  # misuse is found before the folder is touched
    config.check(loaded)
    bars = Bars()
    with RunFolder(out, config.as_dict(), resume, overwrite) as folder:
        result = run_sampler(config, folder, command_line(), bars)
    bars.close()
    row = result["rows"][0]
    numbers = [{"": r.name, **r._asdict()} for r in sampler_numbers(row, loaded.log_z)]
    finish_run(result, out, numbers, ["", "value", "floor", "resampled"], as_json)


@click.command("check-energy")
@click.argument("problem")
@energy_options
@click.option("--samples", default=2_000, show_default=True, help="Configurations to try.")
@common
def check_energy_command(
    problem: str, shape: str | None, particles: bool, torus: bool, scale: float | None, finest: float | None,
    samples: int, seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Is an energy fit to sample from? PROBLEM as for train-sampler.

    Tried on its reference samples or exact draws if it has any, and then also on the virial identity; else on draws of the
    base process N(0, SCALE²).
    """
    from tiltflow.core.geometry import Torus
    from tiltflow.sampling.assess import reference_samples
    from tiltflow.sampling.job import base_draws, symmetries
    from tiltflow.sampling.names import load_problem
    from tiltflow.verdict.check_energy import check_energy

    if check_device(device) != "cpu":
        raise TiltflowError(f"--device {device}: energies are checked on the CPU; leave --device out.")
    loaded = load_problem(problem, parse_shape(shape), parse_space(particles, torus), scale, finest)
    generator = torch.Generator().manual_seed(seed)
    x = reference_samples(loaded, samples, generator)
    where = "base" if x is None else "reference"
    x = base_draws(loaded, samples, generator, scale) if x is None else x
    found = check_energy(
        loaded.energy, x, geometry=loaded.geometry, generator=generator, **symmetries(loaded),
        equilibrium=where == "reference" and not isinstance(loaded.geometry, Torus),
    )  # fmt: skip
    lines = [{"kind": "check", "where": where, **line._asdict()} for line in found.lines]
    text = table(lines, ["status", "name", "value", "threshold", "explanation"])
    text += f"\n\ntried on {len(x)} {'samples of the target' if where == 'reference' else 'draws of the base process'}"
    finish(document(seed, device, lines, found.status), as_json, f"{text}\nverdict: {found.status}")


@click.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-n", "count", default=64, show_default=True, help="How many samples.")
@click.option("--noise", help="Of a fine-tuned run: ode (default), memoryless, or a constant σ such as 0.5.")
@click.option("--steps", type=int, help="Of a fine-tuned run (default: 40).")
@click.option("--method", help="ODE of a fine-tuned run: euler, heun (default), or torchdiffeq's (dopri5).")
@click.option("--out", type=click.Path(path_type=Path), help="FILE.safetensors (default: RUN/drawn.safetensors).")
@common
def sample_command(
    run: Path, count: int, noise: str | None, steps: int | None, method: str | None, out: Path | None, seed: int,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Draw from a run folder: of finetune with the ODE or any noise, of train-sampler with energies and path weights."""
    from tiltflow.sampling.job import is_sampler_run

    target, device = out or run / "drawn.safetensors", check_device(device)
    if is_sampler_run(run):
        from tiltflow.sampling.job import draw_from_sampler

        others = {"--noise": noise, "--steps": steps, "--method": method}
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise TiltflowError(f"{run} is a sampler's run, which has one noise and one grid: leave out {', '.join(given)}.")
        row = draw_from_sampler(run, target, count, seed, device)
        text = f"{target}  {row['shape']}  median energy {cell(row['median_energy'])}  ESS {cell(row['ess'])}"
    else:
        from tiltflow.tilting.draw import draw_from_run

        noise, method = noise or "ode", method or "heun"
        row = draw_from_run(run, target, count, noise, 40 if steps is None else steps, method, seed, device)
        text = f"{target}  {row['shape']}  mean reward {cell(row['reward'])}"
    finish(document(seed, device, [row], None), as_json, text)
