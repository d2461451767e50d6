"""Run folders: config.json, checkpoint, metrics.json, weights, samples, report. One folder belongs to one process."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.train.store import write_text

FORMAT = 1
"""Of run folders; config.json says which."""
CONFIG, METRICS = "config.json", "metrics.json"
CHECKPOINT = "checkpoint.safetensors"
LOCK = ".tiltflow.lock"
SUFFIXES = {".json", ".safetensors", ".html", ".png", ".csv", ".sdf", ".wav", ".md", ".part", ".lock"}
"""Of the files that a run leaves; ``overwrite`` removes no others."""
LOGS = "log"
"""Folder of a logger's files, whatever they are called."""
MORE = "rounds"
"""The one setting that may grow when a run is resumed."""


class RunFolder:
    """Opens ``path`` for writing, as a context manager.

    A folder that holds a finished or interrupted run is refused unless ``resume`` (same config, continue) or ``overwrite``
    (start again) is given. A folder in use by another process, or with files that no run wrote, is always refused.

    Raises:
        TiltflowError: the folder is in use, holds something else, or its config differs from the resumed one.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.config, self.resume, self.overwrite = Path(path), config, resume, overwrite
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise TiltflowError(f"{self.path} is a file; give a folder for the run.")
        ours = (self.path / LOCK).is_file()  # a config.json alone may be anybody's
        others = [p for p in self.path.rglob("*") if p.is_file() and not (ours and _left_by_a_run(p.relative_to(self.path)))]
        if others and not (ours and self.resume):
            named = ", ".join(sorted(str(p.relative_to(self.path)) for p in others)[:3])
            raise TiltflowError(f"{self.path} holds files that are not a run's ({named}); give a new folder.")
        if self.resume and not (ours and (self.path / "config.json").is_file()):
            raise TiltflowError(f"nothing to resume in {self.path}: it has no config.json of a run.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise TiltflowError(f"{self.path} is in use by another run; wait for it or give another folder.") from error
        try:
            self._claim()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _claim(self) -> None:
        """What only the owner of the lock may ask and do."""
        config = self.path / "config.json"
        wanted = json.loads(json.dumps(finite(self.config)))
        if self.resume:
            saved = read_json(config)
            differing = sorted(_differing(saved, wanted))
            if differing:
                was = ", ".join(f"{k}: {a!r} then, {b!r} now" for k, a, b in differing)
                raise TiltflowError(f"cannot resume {self.path} with other settings ({was}). Give the original ones.")
            self.write_json(CONFIG, self.config)
            return
        if config.is_file() and not self.overwrite:
            raise TiltflowError(
                f"{self.path} already holds a run. Give another folder, --resume to continue it, or --overwrite to lose it."
            )
        for p in self.path.iterdir():
            if p.name != LOCK:
                shutil.rmtree(p) if p.is_dir() else p.unlink()
        self.write_json("config.json", self.config)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def checkpoint(self) -> Path:
        """Where training state is kept."""
        return self.path / CHECKPOINT

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds of training that metrics.json holds so far."""
        path = self.path / METRICS
        rows = read_json(path)["rows"] if path.is_file() else []
        return [{k: v for k, v in row.items() if k != "kind"} for row in rows if row.get("kind") == "iteration"]

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file into the folder, atomically; NaN and infinities become null."""
        write_text(self.path / name, json.dumps(finite(document), indent=1) + "\n")


def _left_by_a_run(path: Path) -> bool:
    return path.parts[0] == LOGS or path.suffix in SUFFIXES


def _differing(saved: dict[str, Any], wanted: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ, (name, then, now); a number of rounds that grew does not."""
    for key in saved.keys() | wanted.keys():
        then, now = saved.get(key), wanted.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differing(then, now, f"{where}{key}.")
        elif then != now and not (key == MORE and isinstance(then, int) and isinstance(now, int) and then < now):
            yield f"{where}{key}", then, now


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises TiltflowError if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TiltflowError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise TiltflowError(f"{path} holds no JSON object.")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder. Raises TiltflowError if it is none, or of another format."""
    if not (folder / CONFIG).is_file():
        raise TiltflowError(f"{folder} is not a run folder: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("job"), str) or config.get("format") != FORMAT:
        raise TiltflowError(f"{folder / CONFIG} is not that of a run of this tiltflow: it names no job of format {FORMAT}.")
    return config


def document(command: str, seed: Any, device: str, rows: list[dict[str, Any]], verdict: Any) -> dict[str, Any]:
    """The machine-readable answer of a command, and what metrics.json holds."""
    said = {"command": command, "version": __version__, "seed": seed, "device": device, "rows": rows, "verdict": verdict}
    return finite(said)


def finite(document: Any) -> Any:
    """The document with every non-finite number replaced by None, so that it is valid JSON."""
    if isinstance(document, float):
        return document if document == document and abs(document) != float("inf") else None
    if isinstance(document, dict):
        return {k: finite(v) for k, v in document.items()}
    return [finite(v) for v in document] if isinstance(document, (list, tuple)) else document
