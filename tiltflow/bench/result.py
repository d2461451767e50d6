"""Result files: the document of a command that measured, with the commit that it ran on and how long it took."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError

Row = dict[str, Any]
KEYS = {"command", "version", "seed", "device", "rows", "verdict", "commit"}


def require_result(path: Path | None) -> None:
    """Make sure, before anything is measured, that a result can be written to ``path``; None is no file.

    Raises:
        TiltflowError: a file that is no result, a folder, or a place where nothing can be written.
    """
    if path is None:
        return
    try:
        taken = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long
        raise TiltflowError(f"{str(path)!r:.80} cannot be written: {error}.") from error
    if taken and not _is_result(path):
        raise TiltflowError(f"{path} exists and is not the result of a benchmark; give another file.")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise TiltflowError(f"{path} cannot be written: {above} is {'not writable' if above.is_dir() else 'a file'}.")


def _is_result(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= KEYS


def write_result(path: Path, document: Row, seconds: float) -> None:
    """Write a command's document as a benchmark result."""
    from tiltflow.train.store import write_text  # imports torch, which a check of the path can do without

    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = document | {"commit": head.stdout.strip() or None, "duration": seconds}
    write_text(path, json.dumps(stamped, indent=1) + "\n")


def publish(
    rows: list[Row], seed: int, out: Path | None, started: float, verdict: str | None = None, **more: Any
) -> None:
    """How a script under benchmarks/ ends: print its document, and write it to ``out``; ``started`` is a perf_counter."""
    head = {"command": shlex.join(["python", *sys.argv]), "version": __version__, "seed": seed, "device": "cpu"}
    document = head | more | {"rows": rows, "verdict": verdict}
    if out is not None:
        write_result(out, document, time.perf_counter() - started)
    print(json.dumps(document))
