"""Run folders: config.json, checkpoint, metrics.json, weights, samples, report. One folder belongs to one process.

manifest.json says that a folder is a run's, which files a run may write there, and, once it has ended, what it wrote, with
sizes and checksums. Nothing else in the folder is ever replaced or removed, and nothing in it is ever executed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.store import UNFINISHED, write_text

FORMAT = 2
"""Of run folders; config.json says which."""
CONFIG, METRICS, MANIFEST = "config.json", "metrics.json", "manifest.json"
CHECKPOINT, SAMPLES, REPORT = "checkpoint.safetensors", "samples.safetensors", "report.html"
LOCK = ".tiltflow.lock"
OLDER = Checkpoint(Path(CHECKPOINT)).older.name
EVERY_RUN = (CONFIG, METRICS, MANIFEST, CHECKPOINT, OLDER, SAMPLES, REPORT, "log/events.out.*")
"""Files that a run of any job may write; patterns, in which * also stands for /."""
GROWING = (MANIFEST, METRICS, REPORT, CHECKPOINT, OLDER, SAMPLES)
"""Files that no model is loaded from."""
LARGEST = 2**28
"""Bytes of a JSON file that is read."""
MORE = "rounds"
"""The one setting that may grow when a run is resumed."""


class RunFolder:
    """Opens ``path`` for writing, as a context manager.

    A folder that holds a finished or interrupted run is refused unless ``resume`` (same config, continue) or ``overwrite``
    (start again) is given. A folder in use by another process, or with files and no run, is always refused. Files that are
    not the run's stay as they are.

    Args:
        path: The folder.
        config: What config.json is to hold.
        resume: Continue the run that the folder holds; start it, if it was stopped before it began.
        overwrite: Remove what the manifest says that the run wrote.
        writes: Patterns of the files that the run writes beside those of every run.

    Raises:
        TiltflowError: the folder is in use, holds something else, or its config differs from the resumed one.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        writes: Sequence[str] = (),
    ) -> None:
        self.path, self.config, self.resume, self.overwrite = Path(path), config, resume, overwrite
        self.writes = (*EVERY_RUN, *writes)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise TiltflowError(f"{self.path} is a file; give a folder for the run.")
        if self.resume and not self.path.exists():
            raise TiltflowError(f"nothing to resume: there is no folder {self.path}.")
        self._require_run()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.__exit__(BlockingIOError, error, None)
            raise TiltflowError(f"{self.path} is in use by another run; wait for it or give another folder.") from error
        try:
            self._claim()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _require_run(self) -> None:
        """Raise TiltflowError if there are files, and no run among them."""
        if read_manifest(self.path) is None and (found := files_in(self.path)):
            raise TiltflowError(f"{self.path} holds files that are not a run's ({_named(found)}); give a new folder.")

    def _claim(self) -> None:
        """What only the owner of the lock may ask and do."""
        self._require_run()
        wanted = json.loads(json.dumps(finite(self.config)))
        begun = (self.path / CONFIG).is_file()
        if self.resume and begun:
            self._require_same(read_json(self.path / CONFIG), wanted)
            self.writes = tuple(dict.fromkeys([*self.writes, *(read_manifest(self.path) or {"writes": ()})["writes"]]))
        elif begun and not self.overwrite:
            raise TiltflowError(
                f"{self.path} already holds a run. Give another folder, --resume to continue it, or --overwrite to lose it."
            )
        else:
            self._clear()
        self._sweep()
        self._write_manifest({})
        self.write_json(CONFIG, self.config)

    def _require_same(self, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Raise TiltflowError if the config that a run is resumed with is another."""
        differing = sorted(_differing(saved, wanted))
        if differing:
            was = ", ".join(f"{k}: {a!r:.80} then, {b!r:.80} now" for k, a, b in differing)
            raise TiltflowError(f"cannot resume {self.path} with other settings ({was}). Give the original ones.")

    def _clear(self) -> None:
        """Remove what the run before wrote, its manifest last."""
        manifest, found = read_manifest(self.path), files_in(self.path)
        own = [] if manifest is None else owned(manifest, found)
        taken = [name for name in found if name not in own and self._would_write(name)]
        if taken:
            raise TiltflowError(f"{self.path} holds files of others that the run would write ({_named(taken)}): move them.")
        for name in sorted(own, key=lambda name: name == MANIFEST):
            (self.path / name).unlink()
            for folder in (self.path / name).parents:
                if folder == self.path or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _would_write(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) or pattern.startswith(f"{name}/") for pattern in self.writes)

    def _sweep(self) -> None:
        """Remove what was being written when a process was killed."""
        for folder, folders, _ in os.walk(self.path):
            for name in folders:
                if name.startswith(UNFINISHED):
                    shutil.rmtree(Path(folder) / name, ignore_errors=True)

    def _write_manifest(self, files: dict[str, Any]) -> None:
        self.write_json(MANIFEST, {"format": FORMAT, "version": __version__, "writes": self.writes, "files": files})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is None:
            return
        if kind is None:
            own = [name for name in files_in(self.path) if self._would_write(name) and name != MANIFEST]
            self._write_manifest({name: _described(self.path / name) for name in own})
        os.close(self._lock)
        self._lock = None

    @property
    def checkpoint(self) -> Path:
        """Where training state is kept."""
        return self.path / CHECKPOINT

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds of training that metrics.json holds so far."""
        path = self.path / METRICS
        rows = read_json(path).get("rows") if path.is_file() else []
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [{k: v for k, v in row.items() if k != "kind"} for row in rows if row.get("kind") == "iteration"]

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file into the folder, atomically; NaN and infinities become null."""
        write_text(self.path / name, json.dumps(finite(document), indent=1) + "\n")


def files_in(folder: Path) -> list[str]:
    """The files in a folder and below, by their paths from there, without the lock and what is unfinished. Links count as
    files, and are not followed."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(UNFINISHED)]
        found += [(Path(where) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != LOCK)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None if there is none, or that of something else."""
    if not (folder / MANIFEST).is_file():
        return None
    found = read_json(folder / MANIFEST)
    writes, files = found.get("writes"), found.get("files")
    if not isinstance(writes, list) or not all(isinstance(name, str) for name in writes) or not isinstance(files, dict):
        return None
    if found.get("format") != FORMAT:
        raise TiltflowError(f"{folder} is a run folder of another version of tiltflow ({found.get('version')!r:.40}).")
    return found


def owned(manifest: dict[str, Any], found: Sequence[str]) -> list[str]:
    """Those of the files that are the run's: that its manifest lists, or that it may write, if it has not ended."""
    if manifest["files"]:
        return [name for name in found if name in manifest["files"] or name == MANIFEST]
    return [name for name in found if any(fnmatchcase(name, pattern) for pattern in manifest["writes"])]


def require_whole(folder: Path) -> None:
    """Raise TiltflowError if a file that a model is loaded from is not the one that the run wrote."""
    manifest, found = read_manifest(folder) or {"files": {}}, files_in(folder)
    for name, said in manifest["files"].items():
        path = folder / name
        if name in found and name not in GROWING and path.is_file() and said != _described(path):
            raise TiltflowError(f"{path} is not what the run wrote: it is damaged, or was changed.")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _named(files: Sequence[str]) -> str:
    return ", ".join(files[:3])


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
        if path.stat().st_size > LARGEST:
            raise TiltflowError(f"{path} cannot be read: it has more than {LARGEST} bytes.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except TiltflowError:
        raise
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
