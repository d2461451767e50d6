"""What the commands share: progress bars, tables and the machine-readable answer."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Field, Seed

EXIT_FAIL = 3
SECRET = re.compile(
    r"((?:^|[-_])(?:key|token|secret|password|passwd)=).+|(?<=://)[^/@\s]+(?=@)|\b(?:hf_|sk-|ghp_)\w{8,}", re.IGNORECASE
)
"""What a command line may hold that is nobody else's business."""
NAMES_SECRET = re.compile(r"--?(?:.*[-_])?(?:key|token|secret|password|passwd)$", re.IGNORECASE)
"""Options whose value is a secret."""
SCORES = ("base", "reference", "reached", "ode", "exact")
"""What is said of a score; see :class:`tiltflow.verdict.line.Score`."""


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--seed, --device and --json, which every measuring command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output")(command)
    places = "cpu, cuda, cuda:1, mps, or auto for the fastest there is  [default: cpu]"
    command = click.option("--device", default="cpu", help=places)(command)
    return click.option("--seed", type=_seed(), default=0, help="Seed of every random number  [default: 0]")(command)


def _seed() -> click.ParamType:
    from tiltflow.cli.options import Value

    return Value(Field("seed", Seed, 0, ""))


def check_device(device: str) -> str:
    """The device, if torch has it here."""
    from tiltflow.run.device import check_device

    return check_device(device)


def command_line() -> str:
    """The command as typed, for the record, with secrets masked."""
    words = [SECRET.sub(lambda found: f"{found[1] or ''}***", word) for word in sys.argv[1:]]
    masked = ["***" if i and NAMES_SECRET.match(words[i - 1]) else word for i, word in enumerate(words)]
    return shlex.join(["tiltflow", *masked]).encode("utf-8", "backslashreplace").decode()


def document(seed: int, device: str, rows: list[dict[str, Any]], verdict: str | None) -> dict[str, Any]:
    """The machine-readable answer of this command."""
    from tiltflow.run import folder

    return folder.document(command_line(), seed, device, rows, verdict)


def finish(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print JSON or text; exit 3 if the verdict is fail."""
    click.echo(json.dumps(result) if as_json else text)
    if result["verdict"] == "fail":
        sys.exit(EXIT_FAIL)


def run_job(job: Any, out: Path, resume: bool, overwrite: bool, log: str | None) -> dict[str, Any]:
    """Run a job under progress bars. Of several processes only the first comes back: nothing is left for the others."""
    from tiltflow.run.job import run
    from tiltflow.train.distributed import join, last_words

    rank, bars = join().rank, Bars()
    changed = bool(click.get_current_context().params.get("allow_changed"))
    try:
        with resumable(out):
            how = {"resume": resume, "overwrite": overwrite, "allow_changed": changed}
            result = run(job, out, command=command_line(), tell=bars, log=log, **how)
    except BaseException as error:
        last_words(error)
        raise
    finally:
        bars.close()
    if rank > 0:
        sys.exit(0)
    return result


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """An interrupt says what is saved in a run folder, or beside a file, and which command goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        number, *_ = *error.args, 2
        raise KeyboardInterrupt(number, f"{_saved(out)} To go on: {_again()}") from error


def _saved(out: Path) -> str:
    from tiltflow.run.folder import CHECKPOINT
    from tiltflow.train.checkpoint import Checkpoint

    kept = Checkpoint(out / CHECKPOINT if out.is_dir() else out.with_name(f"{out.name}.checkpoint"))
    try:
        return f"interrupted; all is saved up to round {kept.load()['iteration']}."
    except TiltflowError:
        return "interrupted; no round is saved."


def _again() -> str:
    words = [word for word in shlex.split(command_line()) if word not in ("--overwrite", "--resume")]
    return shlex.join([*words, "--resume"])


def require_new(out: Path) -> None:
    """Raise TiltflowError unless ``out`` does not exist yet and can be written, before anything is computed."""
    if os.path.lexists(out):
        raise TiltflowError(f"{out} exists; give another place with --out.")
    if len(os.fsencode(out.name)) > 255:
        raise TiltflowError(f"{str(out)!r:.80} cannot be written: its name is too long.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise TiltflowError(f"{out} cannot be written: {out.parent} is no folder that can be written to.")


def finish_run(result: dict[str, Any], out: Path, numbers: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    """:func:`finish` for a run folder: its numbers, the verdict's lines, and where the report is."""
    lines = [r for r in result["rows"] if r["kind"] == "verdict"]
    ways = [r | {"command": r["command"].replace("RUN", str(out))} for r in result["rows"] if r["kind"] == "way"]
    missing = next((r["report_error"] for r in result["rows"] if "report_error" in r), None)
    report = f"report:  {out / 'report.html'}" if missing is None else f"report:  none ({missing})"
    text = "\n\n".join(
        [
            table(numbers, columns),
            table(lines, ["status", *(["way"] if ways else []), "name", "value", "low", "high", "threshold"]),
            *([table(ways, ["status", "name", "command"])] if ways else []),
            f"verdict: {result['verdict']}   ({result['rows'][0]['seconds']:.0f} s)\n{report}",
        ]
    )
    finish(result, as_json, text)


def scores_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of a summary, one row each: of the base, the reference, and as reached in each way of sampling."""
    names = [k.removesuffix("_base") for k in summary if k.endswith("_base")]
    return [{"": name, **{part: summary.get(f"{name}_{part}") for part in SCORES}} for name in names]


class Bars:
    """Progress bars on standard error, one per stage."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of stage ``what``; ``note`` is shown behind it."""
        from tqdm import tqdm

        if what != self.what or total != self.bar.total:
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

