"""Commands of the first job: fine-tune towards a reward, check a reward, pretrain the digits, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltflow.cli.common import (
    SCORES,
    Bars,
    command_line,
    common,
    document,
    finish,
    finish_run,
    resumable,
    run_job,
    scores_of,
    table,
)
from tiltflow.cli.options import given, options, run_options, trust_option
from tiltflow.core.errors import TiltflowError
from tiltflow.run.names import Trusted
from tiltflow.tilting.settings import FinetuneSettings, TiltConfig, suited

if TYPE_CHECKING:
    from tiltflow.tilting.job import TiltJob

CHECKED = ("base", "reward", "judges", "conditions", "predicts", "interpolant", "shape", "label", "guidance")
"""Fields of a fine-tuning that a check of its reward needs too."""


def named_base(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a fine-tuning that were given; with --trust, a run folder as a base may bring code."""
    fields = given(values, TiltConfig)
    return fields | ({"base": Trusted(fields["base"])} if values["trust"] and "base" in fields else {})


def finetune_job(**values: Any) -> TiltJob:
    """The job of the command's options."""
    fields = named_base(values)
    named = TiltConfig(**fields)
    training = FinetuneSettings.of(named.method, suited(named.base), **given(values, FinetuneSettings))
    from tiltflow.tilting.job import TiltJob

    return TiltJob(**fields, settings=training)


@click.command("finetune")
@options(TiltConfig, FinetuneSettings)
@trust_option
@run_options
def finetune_command(out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool, **values: Any) -> None:
    """Fine-tune a base towards a reward; leave a run folder with weights, samples, metrics, report and verdict."""
    result = run_job(finetune_job(**values), out, resume, overwrite, log)
    finish_run(result, out, scores_of(result["rows"][0]), ["", *SCORES], as_json)


@click.command("pretrain")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weights to write, FILE.safetensors.")
@click.option("--steps", type=click.IntRange(1), default=24_000, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--resume", is_flag=True, help="Continue from FILE.safetensors.checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.safetensors.")
@common
def pretrain_command(
    out: Path, steps: int, batch: int, learning_rate: float, resume: bool, overwrite: bool, seed: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Train the class-conditional digits flow (5,000 real MNIST digits) from scratch."""
    checkpoint = out.with_name(out.name + ".checkpoint")
    for file in (out, checkpoint):
        if file.exists() and not overwrite and not (resume and file == checkpoint):
            raise TiltflowError(f"{file} exists; give another file, or --overwrite.")
    if device != "cpu":
        raise TiltflowError("the digits recipe is for the CPU; leave --device out.")
    from tiltflow.digits.pretrain import pretrain_digits
    from tiltflow.digits.weights import load_network
    from tiltflow.train.store import load_state

    for file, read in ((out, load_network), (checkpoint, load_state)):
        if file.exists() and not resume:
            read(file)  # refuses what is somebody else's
    bars, last = Bars(), {"loss": float("nan")}

    def advance(row: dict[str, Any]) -> None:
        last["loss"] = row["loss"]
        bars("flow matching", row["iteration"] + 1, steps)

    with resumable(out):
        pretrain_digits(out, steps, batch, learning_rate, seed, resume, callback=advance)
    bars.close()
    row = {"out": str(out), "steps": steps, "loss": last["loss"]}
    finish(document(seed, device, [row], None), as_json, f"{out}  loss {last['loss']:.4f}")


@click.command("check-reward")
@options(TiltConfig, leave=tuple(f for f in TiltConfig.__dataclass_fields__ if f not in CHECKED))
@click.option("--strength", "strengths", type=float, multiple=True, help="λ to tabulate; may be repeated.")
@click.option("--samples", type=click.IntRange(100), default=2_000, show_default=True, help="Base samples to use.")
@click.option("--steps", type=click.IntRange(1, 100_000), default=40, show_default=True, help="Simulation steps.")
@trust_option
@common
def check_reward_command(
    strengths: tuple[float, ...], samples: int, steps: int, seed: int, device: str, as_json: bool, **values: Any
) -> None:
    """Is the reward usable, and which λ? From base samples alone, before any training."""
    fields = named_base(values)
    TiltConfig(**fields, seed=seed)
    import torch

    from tiltflow.core.ode import ode
    from tiltflow.run.device import check_device
    from tiltflow.tilting.job import TiltJob
    from tiltflow.verdict.check_reward import check_reward

    job = TiltJob(**fields, seed=seed, device=check_device(device))
    process, spec, generator = job.load_base(), job.load_reward(), torch.Generator(device).manual_seed(seed)
    condition = spec.conditions(1, generator) if spec.conditions else {}
    seen = {} if spec.adapt is not None else condition
    x0 = process.source(samples, generator, device=device)
    parts = []
    for x in x0.split(1000):
        one: dict[str, Any] = {k: v.expand(len(x), *v.shape[1:]) for k, v in seen.items()}
        parts.append(ode(process, x, steps, **one))
    found = check_reward(
        process, spec.reward, samples=torch.cat(parts), generator=generator, strengths=strengths,
        judge=None if spec.conditions else next(iter(spec.judges.values()), None), **condition,
    )  # fmt: skip
    lines = [{"kind": "check", **line._asdict()} for line in found.lines]
    ladder = [{"kind": "strength", **row._asdict()} for row in found.strengths]
    columns = [c for c in ladder[0] if c != "kind"] if ladder else []
    suggestion = "none" if found.suggestion is None else f"{found.suggestion:.3g}"
    text = "\n\n".join(
        [
            table(lines, ["status", "name", "value", "threshold", "explanation"]),
            table(ladder, columns) if ladder else "",
            f"largest λ with ESS ≥ 5 %: {suggestion}\nverdict: {found.status}",
        ]
    )
    rows = [*lines, *ladder, {"kind": "suggestion", "strength": found.suggestion}]
    finish(document(seed, device, rows, found.status), as_json, text)


@click.group("demo")
def demo() -> None:
    """Pictures that explain."""


@demo.command("memoryless")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/memoryless"), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=250, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@common
def memoryless_command(out: Path, rounds: int, overwrite: bool, seed: int, device: str, as_json: bool) -> None:
    """The same 2-D problem fine-tuned with σ = 0.2, σ = 1 and the memoryless noise, beside the exact tilt."""
    if device != "cpu":
        raise TiltflowError("this demo is for the CPU; leave --device out.")
    from tiltflow.bench.demo import memoryless_demo

    bars = Bars()
    result = memoryless_demo(out, seed, rounds, bars, overwrite, command_line())
    bars.close()
    text = table(result["rows"], ["noise", "residual_correlation", "mode_tv", "w2", "w2_floor"])
    finish(result, as_json, f"{text}\npicture: {out / 'memoryless.png'}")
