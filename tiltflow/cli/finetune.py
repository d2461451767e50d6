"""Commands of the first job: fine-tune towards a reward, check a reward, pretrain the digits, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from tiltflow.cli.common import (
    Bars,
    base_options,
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
from tiltflow.run.folder import RunFolder


@click.command("finetune")
@base_options
@click.option("--reward", default="thickness", show_default=True,
              help="thickness, digit-0 … digit-9, inpainting, or module:function (x) → (B,).")  # fmt: skip
@click.option("--judge", help="Held-out judge of a foreign reward, module:function (x) → (B,).")
@click.option("--strength", default=1.0, show_default=True, help="λ ≥ 0; see `tiltflow check-reward`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option("--rounds", default=80, show_default=True, help="Rounds of Adjoint Matching.")
@click.option("--batch", default=96, show_default=True, help="Paths per round.")
@click.option("--steps", default=25, show_default=True, help="Simulation steps K.")
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--rank", default=32, show_default=True, help="Rank of the trained updates; 0 trains all weights.")
@click.option("--gradient-steps", default=4, show_default=True, help="Gradient steps per round.")
@click.option("--buffer-rounds", default=8, show_default=True, help="Rounds of paths to train on.")
@click.option("--importance/--no-importance", default=True, show_default=True,
              help="Weight paths by their path weights; not where the reward saturates.")  # fmt: skip
@click.option("--last-steps", type=int, help="Regress on the last N steps only (default: on all) …")
@click.option("--random-steps", default=0, help="… and on N others drawn each round.")
@click.option("--clip", type=float, help="Per-term clip of the loss (the paper: 1.6 λ²).")
@click.option("--max-cost-gradient", type=float, help="Bound on the norm of λ∇r.")
@click.option("--sigma", type=float, help="Constant noise instead of the memoryless one: biased, needs --allow-biased.")
@click.option("--allow-biased", is_flag=True, help="Accept a schedule that is not memoryless.")
@click.option("--chi", default=0.0, help="σ² = 2η + χ.")
@click.option("--reference-samples", default=20_000, show_default=True, help="Base samples of the exact reference.")
@click.option("--samples", default=4_000, show_default=True, help="Samples to judge.")
@common
def finetune_command(
    base: str, predicts: Any, interpolant: str, shape: str | None, label: int | None, guidance: float,
    reward: str, judge: str | None, strength: float, out: Path, resume: bool, overwrite: bool,
    reference_samples: int, samples: int, seed: int, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Fine-tune a base towards a reward; leave a run folder with weights, samples, metrics, report and verdict."""
    from tiltflow.tilting.settings import FinetuneSettings
    from tiltflow.tilting.job import RunConfig, run_finetune

    options["rank"] = options["rank"] or None
    config = RunConfig(
        base, reward, strength, judge, predicts, interpolant, parse_shape(shape), label, guidance,
        seed, check_device(device), reference_samples, samples, FinetuneSettings(**options),
    )  # fmt: skip
    spec, process = config.load_reward(), config.load_base()  # misuse is found before the folder is touched
    config = config.fit_to(process)
    config.check(process, spec)
    bars = Bars()
    with RunFolder(out, config.as_dict(), resume, overwrite) as folder:
        result = run_finetune(config, folder, command_line(), bars)
    bars.close()
    summary = result["rows"][0]
    scores = [k[:-5] for k in summary if k.endswith("_base")]
    rows = [
        {"": name, **{c: summary[f"{name}_{c}"] for c in ("base", "reference", "reached")}} for name in scores
    ]
    finish_run(result, out, rows, ["", "base", "reference", "reached"], as_json)


@click.command("pretrain")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weights to write, FILE.safetensors.")
@click.option("--steps", default=24_000, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--resume", is_flag=True, help="Continue from FILE.safetensors.checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.safetensors.")
@common
def pretrain_command(
    out: Path, steps: int, batch: int, learning_rate: float, resume: bool, overwrite: bool, seed: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Train the class-conditional digits flow (5,000 real MNIST digits) from scratch."""
    from tiltflow.digits.pretrain import pretrain_digits

    if out.exists() and not overwrite:
        raise TiltflowError(f"{out} exists; give another file, or --overwrite.")
    if device != "cpu":
        raise TiltflowError("the digits recipe is for the CPU; leave --device out.")
    bars, last = Bars(), {"loss": float("nan")}

    def advance(row: dict[str, Any]) -> None:
        last["loss"] = row["loss"]
        bars("flow matching", row["iteration"] + 1, steps)

    pretrain_digits(out, steps, batch, learning_rate, seed, resume, callback=advance)
    bars.close()
    row = {"out": str(out), "steps": steps, "loss": last["loss"]}
    finish(document(seed, device, [row], None), as_json, f"{out}  loss {last['loss']:.4f}")


@click.command("check-reward")
@base_options
@click.option("--reward", default="thickness", show_default=True, help="As for finetune.")
@click.option("--judge", help="Held-out judge, module:function.")
@click.option("--strength", "strengths", type=float, multiple=True, help="λ to tabulate; may be repeated.")
@click.option("--samples", default=2_000, show_default=True, help="Base samples to use.")
@click.option("--steps", default=40, show_default=True, help="Simulation steps.")
@common
def check_reward_command(
    base: str, predicts: Any, interpolant: str, shape: str | None, label: int | None, guidance: float,
    reward: str, judge: str | None, strengths: tuple[float, ...], samples: int, steps: int,
    seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Is the reward usable, and which λ? From base samples alone, before any training."""
    from tiltflow.core.ode import ode
    from tiltflow.tilting.names import load_base, load_reward
    from tiltflow.verdict.check_reward import check_reward

    generator = torch.Generator().manual_seed(seed)
    process = load_base(base, predicts, interpolant, parse_shape(shape), label, guidance)
    spec = load_reward(reward, judge)
    condition = spec.conditions(1, generator) if spec.conditions else {}
    x0 = process.source(samples, generator)
    drawn = torch.cat([ode(process, part, steps) for part in x0.split(1000)])
    found = check_reward(
        process, spec.reward, samples=drawn, generator=generator, strengths=strengths,
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
@click.option("--rounds", default=250, show_default=True)
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
