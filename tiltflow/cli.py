"""The command line: ``tiltflow COMMAND``. Exit codes: 0 success, 2 misuse, 3 the verdict is FAIL.

Every command that measures prints one JSON document with ``--json`` (on standard output; everything else goes to standard
error): {"command", "version", "seed", "device", "rows", "verdict"}.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from tqdm import tqdm

from tiltflow import __version__
from tiltflow.errors import TiltflowError
from tiltflow.run import RunFolder, finite

EXIT_MISUSE, EXIT_FAIL = 2, 3


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--seed, --device and --json, which every measuring command has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
        click.option("--device", default="cpu", show_default=True, help="torch device."),
        click.option("--seed", default=0, show_default=True, help="Seed of every random number."),
    ):
        command = option(command)
    return command


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to name a base process."""
    for option in (
        click.option("--guidance", default=1.0, show_default=True, help="Classifier-free guidance scale."),
        click.option("--label", type=int, help="Class of a class-conditional digits base."),
        click.option("--shape", help="Shape of one sample of a foreign model, e.g. 1,28,28."),
        click.option("--interpolant", default="linear", show_default=True, help="linear, cosine or vp (foreign models)."),
        click.option("--predicts", type=click.Choice(["velocity", "eps", "x1", "score"]), help="Output of a foreign model."),
        click.option("--base", default="digits", show_default=True, help="digits, FILE.safetensors or module:function."),
    ):
        command = option(command)
    return command


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """ "1,28,28" → (1, 28, 28)."""
    try:
        return tuple(int(n) for n in text.split(",")) if text else None
    except ValueError as error:
        raise TiltflowError(f"--shape {text!r}: write integers with commas, e.g. 1,28,28.") from error


def check_device(device: str) -> str:
    """The device, if torch has it here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TiltflowError(f"--device {device}: not usable here ({str(error).splitlines()[0]}).") from error
    return device


def command_line() -> str:
    """The command as typed, for the record."""
    return shlex.join(["tiltflow", *sys.argv[1:]])


def document(seed: int, device: str, rows: list[dict[str, Any]], verdict: str | None) -> dict[str, Any]:
    """The machine-readable answer of a command."""
    return finite(
        {"command": command_line(), "version": __version__, "seed": seed, "device": device, "rows": rows, "verdict": verdict}
    )


def finish(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print JSON or text; exit 3 if the verdict is fail."""
    click.echo(json.dumps(result) if as_json else text)
    if result["verdict"] == "fail":
        sys.exit(EXIT_FAIL)


class Bars:
    """Progress bars on standard error, one per stage."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of stage ``what``."""
        if what != self.what:
            self.close()
            self.what = what
            self.bar = tqdm(total=total, desc=what, file=sys.stderr, mininterval=1.0)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Finish the current bar."""
        if self.bar is not None:
            self.bar.close()


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Tilt a flow or diffusion model towards a reward, p_base(x)·exp(λ r(x)), and know whether it is right."""


@cli.command("finetune")
@base_options
@click.option("--reward", default="thickness", show_default=True,
              help="thickness, digit-0 … digit-9, inpainting, or module:function (x) → (B,).")  # fmt: skip
@click.option("--judge", help="Held-out judge of a foreign reward, module:function (x) → (B,).")
@click.option("--strength", default=1.0, show_default=True, help="λ ≥ 0; see `tiltflow check-reward`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option("--iterations", default=80, show_default=True, help="Rounds of Adjoint Matching.")
@click.option("--batch", default=96, show_default=True, help="Paths per round.")
@click.option("--steps", default=25, show_default=True, help="Simulation steps K.")
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--rank", default=32, show_default=True, help="Rank of the trained updates; 0 trains all weights.")
@click.option("--updates", default=4, show_default=True, help="Gradient steps per round.")
@click.option("--buffer-rounds", default=8, show_default=True, help="Rounds of paths to train on.")
@click.option("--last-steps", type=int, help="Regress on the last N steps only (default: on all) …")
@click.option("--random-steps", default=0, help="… and on N others drawn each round.")
@click.option("--clip", type=float, help="Per-term clip of the loss (the paper: 1.6 λ²).")
@click.option("--max-reward-grad", type=float, help="Bound on the norm of λ∇r.")
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
    from tiltflow.finetune import FinetuneSettings
    from tiltflow.finetune_run import RunConfig, run_finetune

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
    lines = [r for r in result["rows"] if r["kind"] == "verdict"]
    scores = [k[:-5] for k in summary if k.endswith("_base")]
    rows = [
        {"": name, **{c: summary[f"{name}_{c}"] for c in ("base", "reference", "reached")}} for name in scores
    ]
    text = "\n\n".join(
        [
            table(rows, ["", "base", "reference", "reached"]),
            table(lines, ["status", "name", "value", "low", "high", "threshold"]),
            f"verdict: {result['verdict']}   ({summary['seconds']:.0f} s)\nreport:  {out / 'report.html'}",
        ]
    )
    finish(result, as_json, text)


@cli.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-n", "count", default=64, show_default=True, help="How many samples.")
@click.option("--noise", default="ode", show_default=True, help="ode, memoryless, or a constant σ such as 0.5.")
@click.option("--steps", default=40, show_default=True)
@click.option("--method", default="heun", show_default=True, help="ODE: euler, heun, or torchdiffeq's (dopri5).")
@click.option("--out", type=click.Path(path_type=Path), help="FILE.safetensors (default: RUN/drawn.safetensors).")
@common
def sample_command(
    run: Path, count: int, noise: str, steps: int, method: str, out: Path | None, seed: int, device: str, as_json: bool
) -> None:
    """Draw from a run folder with the ODE or any noise schedule and step count."""
    from tiltflow.draw import draw_from_run

    target = out or run / "drawn.safetensors"
    row = draw_from_run(run, target, count, noise, steps, method, seed, check_device(device))
    finish(document(seed, device, [row], None), as_json, f"{target}  {row['shape']}  mean reward {_cell(row['reward'])}")


@cli.command("pretrain")
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
    from tiltflow.pretrain import pretrain_digits

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


@cli.command("check-reward")
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
    from tiltflow.check import check_reward
    from tiltflow.registry import load_base, load_reward
    from tiltflow.simulate import ode

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


@cli.group("demo")
def demo() -> None:
    """Pictures that explain."""


@demo.command("memoryless")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/memoryless"), show_default=True)
@click.option("--iterations", default=250, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@common
def memoryless_command(out: Path, iterations: int, overwrite: bool, seed: int, device: str, as_json: bool) -> None:
    """The same 2-D problem fine-tuned with σ = 0.2, σ = 1 and the memoryless noise, beside the exact tilt."""
    from tiltflow.demo import memoryless_demo

    bars = Bars()
    rows, picture = memoryless_demo(out, seed, iterations, bars, overwrite)
    bars.close()
    text = table(rows, ["noise", "residual_correlation", "mode_tv", "w2", "w2_floor"])
    finish(document(seed, device, rows, None), as_json, f"{text}\npicture: {picture}")


@cli.group("bench")
def bench() -> None:
    """Measurements against closed forms; rows accumulate in benchmarks/results."""


def bench_options(function: Any) -> Any:
    """Rounds and the result file, on top of the common options."""
    function = click.option("--out", type=click.Path(path_type=Path), help="Also write the document to this file.")(function)
    function = click.option("--iterations", type=int, help="Rounds of training (default: the protocol's).")(function)
    return common(function)


def measure(
    run: Callable[[Bars], list[dict[str, Any]]], columns: str, out: Path | None, seed: int, device: str, as_json: bool
) -> None:
    """Run a benchmark, write its result, print its rows."""
    from tiltflow.bench import write_result

    if device != "cpu":
        raise TiltflowError(f"--device {device}: the benchmarks compare processor seconds and run on the CPU only.")
    started, bars = time.perf_counter(), Bars()
    rows = run(bars)
    bars.close()
    result = document(seed, device, rows, None)
    if out is not None:
        write_result(out, result, time.perf_counter() - started)
    finish(result, as_json, table(rows, columns.split()))


@bench.command("tilt")
@click.option("--problem", "problems", multiple=True, help="Only these (default: all; with --methods: mixture2d).")
@click.option("--methods", help="all, or names with commas, at one budget (default: Adjoint Matching at its own).")
@bench_options
def tilt_command(problems: tuple[str, ...], methods: str | None, iterations: int | None, seed: int, **options: Any) -> None:
    """Methods on the analytic problems, SDE and ODE sampling."""
    from tiltflow.bench import bench_tilt
    from tiltflow.presets import chosen

    names = None if methods is None else chosen(methods, vectors=True)
    columns = "problem method sampler seed w2 w2_floor mode_tv mode_weight_error log_z_error ess chain_ess seconds"
    measure(lambda bars: bench_tilt(problems, seed, iterations, bars, names), columns, seed=seed, **options)


@bench.command("digits")
@click.option("--methods", default="all", show_default=True, help="all, or names with commas.")
@bench_options
def digits_command(methods: str, iterations: int | None, seed: int, **options: Any) -> None:
    """Every method on the digits base, at one budget."""
    from tiltflow.bench_digits import bench_digits
    from tiltflow.presets import chosen

    names = chosen(methods, vectors=False)
    columns = "method reward judge_thickness kl diversity w2 ess base_evaluations reward_calls seconds"
    measure(lambda bars: bench_digits(names, seed, iterations, bars), columns, seed=seed, **options)


@bench.command("control")
@click.option("--methods", default="all", show_default=True, help="all, or names with commas.")
@bench_options
def control_command(methods: str, iterations: int | None, seed: int, **options: Any) -> None:
    """Optimal-control methods on problems whose exact control is known."""
    from tiltflow.bench_control import bench_control

    columns = "problem method control_error control_error_own_paths objective objective_exact seconds"
    measure(lambda bars: bench_control(methods, seed, iterations, bars), columns, seed=seed, **options)


def main() -> NoReturn:
    """Entry point: turns errors into exit codes."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TiltflowError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_MISUSE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the last checkpoint is in the run folder (--resume continues it)", err=True)
        sys.exit(130)
    sys.exit(0)
