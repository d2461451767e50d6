"""Run folders: config.json, checkpoint, metrics.json, weights, samples, report. One folder belongs to one process."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.train.store import write_text

CHECKPOINT = "checkpoint.safetensors"
LOCK = ".tiltflow.lock"
SUFFIXES = {".json", ".safetensors", ".html", ".png", ".csv", ".sdf", ".wav", ".md", ".part", ".lock"}
"""Of the files that a run leaves; ``overwrite`` removes no others."""


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
        others = [p for p in self.path.rglob("*") if p.is_file() and not (ours and p.suffix in SUFFIXES)]
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
            try:
                saved = json.loads(config.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TiltflowError(f"{config} is damaged: {error}.") from error
            differing = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
            if differing:
                was = ", ".join(f"{k}: {saved.get(k)!r} then, {wanted.get(k)!r} now" for k in differing)
                raise TiltflowError(f"cannot resume {self.path} with other settings ({was}). Give the original ones.")
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

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file into the folder, atomically; NaN and infinities become null."""
        write_text(self.path / name, json.dumps(finite(document), indent=1) + "\n")


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
