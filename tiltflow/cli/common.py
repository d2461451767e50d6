"""What the commands share: options, progress bars, tables and the machine-readable answer."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from tiltflow.core.errors import TiltflowError
from tiltflow.run import folder as run

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
    """The machine-readable answer of this command."""
    return run.document(command_line(), seed, device, rows, verdict)


def finish(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print JSON or text; exit 3 if the verdict is fail."""
    click.echo(json.dumps(result) if as_json else text)
    if result["verdict"] == "fail":
        sys.exit(EXIT_FAIL)


def finish_run(result: dict[str, Any], out: Path, numbers: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    """:func:`finish` for a run folder: its numbers, the verdict's lines, and where the report is."""
    lines = [r for r in result["rows"] if r["kind"] == "verdict"]
    text = "\n\n".join(
        [
            table(numbers, columns),
            table(lines, ["status", "name", "value", "low", "high", "threshold"]),
            f"verdict: {result['verdict']}   ({result['rows'][0]['seconds']:.0f} s)\nreport:  {out / 'report.html'}",
        ]
    )
    finish(result, as_json, text)


class Bars:
    """Progress bars on standard error, one per stage."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of stage ``what``; ``note`` is shown behind it."""
        if what != self.what:
            self.close()
            self.what = what
            self.bar = tqdm(total=total, desc=what, file=sys.stderr, mininterval=1.0)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Finish the current bar."""
        if self.bar is not None:
            self.bar.close()


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns] + [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


def cell(value: Any) -> str:
    """A value as text: a dash for None, four significant digits."""
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
