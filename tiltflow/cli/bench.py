"""The benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tiltflow.bench import names
from tiltflow.bench.result import require_result, write_result
from tiltflow.cli.common import Bars, common, document, finish, table
from tiltflow.cli.options import option
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, Field, Positive
from tiltflow.methods.registry import chosen

ROUNDS = Field("rounds", Count | None, None, "Rounds of training; none: the protocol's")
MINUTES = Field("minutes", Positive | None, None, "As many rounds as this time allows, instead of --rounds")
SEEDS = Field("seeds", Count, 20, "Seeds of every case")
MOLECULES = Field("molecules", Count | None, None, "Only the first so many, for short runs")


@click.group("bench")
def bench() -> None:
    """Measurements against closed forms; rows accumulate in benchmarks/results."""


def result_options(function: Any) -> Any:
    """The result file, on top of the common options."""
    function = click.option("--out", type=click.Path(path_type=Path), help="Also write the document to this file.")(function)
    return common(function)


def bench_options(function: Any) -> Any:
    """Rounds of training, on top of :func:`result_options`."""
    return result_options(option(ROUNDS)(function))


def methods_option(function: Any) -> Any:
    """Names of methods."""
    return click.option("--methods", default="all", show_default=True, help="all, or names with commas.")(function)


def require_place(out: Path | None, device: str) -> None:
    """Refuse, before torch is imported, a result that cannot be written and a device that is not the CPU."""
    if device != "cpu":
        raise TiltflowError(f"--device {device}: the benchmarks compare processor seconds and run on the CPU only.")
    require_result(out)


def measure(
    run: Callable[[Bars], list[dict[str, Any]]], columns: str, out: Path | None, seed: int, device: str, as_json: bool
) -> None:
    """Run a benchmark, print its rows (if rows are of several kinds, the summary), write its result."""
    started, bars = time.perf_counter(), Bars()
    rows = run(bars)
    bars.close()
    result = document(seed, device, rows, None)
    finish(result, as_json, table([r for r in rows if r.get("kind", "summary") == "summary"], columns.split()))
    if out is not None:
        write_result(out, result, time.perf_counter() - started)


@bench.command("tilt")
@click.option("--problem", "problems", multiple=True, help="Only these (default: all; with --methods: mixture2d).")
@click.option("--methods", help="all, or names with commas, at one budget (default: Adjoint Matching at its own).")
@bench_options
def tilt_command(problems: tuple[str, ...], methods: str | None, rounds: int | None, seed: int, **options: Any) -> None:
    """Methods on the analytic problems, SDE and ODE sampling."""
    wanted = None if methods is None else chosen(methods, names.TILT)
    require_place(options["out"], options["device"])
    from tiltflow.bench.tilt import bench_tilt

    columns = "problem method sampler seed w2 w2_floor mode_tv mode_weight_error log_z_error ess chain_ess seconds"
    measure(lambda bars: bench_tilt(problems, seed, rounds, bars, wanted), columns, seed=seed, **options)


@bench.command("digits")
@methods_option
@bench_options
def digits_command(methods: str, rounds: int | None, seed: int, **options: Any) -> None:
    """Every method on the digits base, at one budget."""
    wanted = chosen(methods, names.DIGITS)
    require_place(options["out"], options["device"])
    from tiltflow.bench.digits import bench_digits

    columns = "method reward judge_thickness kl diversity w2 ess base_evaluations reward_calls seconds"
    measure(lambda bars: bench_digits(wanted, seed, rounds, bars), columns, seed=seed, **options)


@bench.command("verdict")
@click.option("--base", "bases", multiple=True, help=f"Only these of {', '.join(names.VERDICT)}.")
@option(SEEDS)
@result_options
def verdict_command(bases: tuple[str, ...], seeds: int | None, seed: int, **options: Any) -> None:
    """How often the verdict is wrong, on samplers that are wrong on purpose and on honest ones."""
    unknown = [base for base in bases if base not in names.VERDICT]
    if unknown:
        raise TiltflowError(f"there is no base {unknown[0]!r} here: use {', '.join(names.VERDICT)}.")
    require_place(options["out"], options["device"])
    from tiltflow.bench.verdict import bench_verdict

    columns, many = "base case verdicts pass warn cannot_tell fail refused wrong share", seeds or SEEDS.default
    measure(lambda bars: bench_verdict(seed, many, bases or names.VERDICT, bars), columns, seed=seed, **options)


@bench.command("control")
@methods_option
@bench_options
def control_command(methods: str, rounds: int | None, seed: int, **options: Any) -> None:
    """Optimal-control methods on problems whose exact control is known."""
    wanted = chosen(methods, names.CONTROL)
    require_place(options["out"], options["device"])
    from tiltflow.bench.control import bench_control

    columns = "problem method control_error control_error_own_paths objective objective_exact seconds"
    measure(lambda bars: bench_control(wanted, seed, rounds, bars), columns, seed=seed, **options)


@bench.command("sampling")
@click.option("--problem", "problems", multiple=True, required=True, help="gmm40, dw4, module:function, …; repeatable.")
@methods_option
@click.option("--reference", type=click.Path(path_type=Path), help="FILE.npy of samples (N, *event) to compare with.")
@option(MINUTES)
@bench_options
def sampling_command(
    problems: tuple[str, ...],
    methods: str,
    reference: Path | None,
    minutes: float | None,
    rounds: int | None,
    seed: int,
    **options: Any,
) -> None:
    """Samplers of e^{−E} and parallel tempering."""
    wanted = chosen(methods, names.SAMPLING)
    require_place(options["out"], options["device"])
    from tiltflow.bench.sampling import bench_sampling

    def run(bars: Bars) -> list[dict[str, Any]]:
        return bench_sampling(problems, wanted, seed, rounds, minutes, reference, bars)

    measure(run, " ".join(names.COLUMNS), seed=seed, **options)


@bench.command("conformers")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of references (default: benchmarks/data/geom_drugs).")
@methods_option
@option(MOLECULES)
@result_options
def conformers_command(data: Path | None, methods: str, molecules: int | None, seed: int, **options: Any) -> None:
    """Coverage of reference conformers by generated ones.

    With --out FILE, finished molecules are kept in FILE.parts, where an interrupted run resumes. It is deleted in the end.
    """
    require_place(options["out"], options["device"])
    from tiltflow.bench.conformers import COLUMNS, DATA, bench_conformers, chosen_generators

    wanted, out = chosen_generators(methods), options["out"]
    if data is None and not DATA.is_dir():
        raise TiltflowError(f"the references are not part of the package and not at {DATA}; give their folder: --data DIR.")
    parts = None if out is None else out.with_name(out.name + ".parts")

    def run(bars: Bars) -> list[dict[str, Any]]:
        rows = bench_conformers(data or DATA, wanted, seed, molecules, parts, bars)
        for row in (row for row in rows if row["kind"] == "skipped"):
            click.echo(f"skipped: {row['molecule']}: {row['reason']}", err=True)
        return rows

    measure(run, " ".join(COLUMNS), seed=seed, **options)
    if parts is not None:
        for kept in parts.glob("*.json*"):
            kept.unlink()
        if not any(parts.iterdir()):
            parts.rmdir()
