"""The one flow of a job: check → claim the folder → train → judge → write what came out, then the page.

A job says what it depends on (its config), how it trains, and how what it trained is judged. What can be known to go wrong
is found before the folder is touched; a picture that fails never costs the verdict.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError, TiltflowWarning
from tiltflow.core.progress import Tell, silent
from tiltflow.report.page import Block, Page, require_report, write_page
from tiltflow.run.device import check_device
from tiltflow.run.folder import FORMAT, MORE, SAMPLES, RunFolder, document, finite
from tiltflow.run.log import Log, require_logger
from tiltflow.run.names import sources
from tiltflow.train.checkpoint import Checkpoint, seed_global_generators
from tiltflow.train.distributed import leave, together, world
from tiltflow.train.store import write_tensors
from tiltflow.verdict.line import Score, Verdict

SETTINGS = "the settings"
"""What of the identity of a run must always be the same."""
EVERY = 5.0
"""Seconds between two writings of metrics.json while training."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    Args:
        title: Heading of the page.
        summary: The numbers of the run, without kind and clock.
        verdict: The answer, its lines and scores; None where there is nothing to judge.
        rows: Further rows of metrics.json, each with its "kind".
        tensors: What samples.safetensors holds; None of it: no such file.
        history: One row per round of training.
        facts: Numbers beside the answer of the page.
        notes: Sentences that the reader should know.
        draw: Makes the blocks of the page: what came out, and how it got there.
    """

    title: str
    summary: Row
    verdict: Verdict | None
    rows: Sequence[Row] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    history: Sequence[Row] = ()
    facts: Mapping[str, float | None] = field(default_factory=dict)
    notes: Sequence[str] = ()
    draw: Callable[[], tuple[Sequence[Block], Sequence[Block]]] = lambda: ((), ())


class Work:
    """What a job is given while it runs: its folder, whom to tell what is going on, and where rounds are written.

    Without a log nothing is written: that of a process that only helps.
    """

    def __init__(
        self, folder: RunFolder, checkpoint: Checkpoint, tell: Tell, log: Log | None, head: Mapping[str, Any]
    ) -> None:
        self.folder, self.checkpoint, self.tell, self.log, self.head = folder, checkpoint, tell, log, head
        self.path = folder.path
        self.resume = folder.resume and checkpoint.exists()  # without a checkpoint a run starts again
        self.rounds: list[Row] = folder.rounds() if self.resume else []
        self.written = time.monotonic()

    def round(self, row: Row, what: str, total: int, note: str = "") -> None:
        """A round of training is done: tell, log, and let metrics.json grow."""
        if self.log is None:
            return
        done, total = row["iteration"] + 1, min(total, row.get("until") or total)
        self.rounds = [r for r in self.rounds if r["iteration"] < row["iteration"]] + [scalars(row)]
        self.tell(what, done, total, note)
        self.log(scalars(row), done)
        if done == total or time.monotonic() - self.written > EVERY:
            rows = [{"kind": "iteration", **r} for r in self.rounds]
            self.folder.write_json("metrics.json", document(**self.head, rows=rows, verdict=None))
            self.written = time.monotonic()


class Job(Protocol):
    """Settings of a run (see :mod:`tiltflow.core.settings`); ``name`` is what its config.json calls it, and ``writes`` are
    the files that it leaves (:class:`~tiltflow.run.folder.RunFolder`)."""

    name: ClassVar[str]
    writes: ClassVar[tuple[str, ...]]

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> str: ...

    def config(self) -> dict[str, Any]:
        """Everything the run depends on, as JSON."""
        ...

    def check(self) -> None:
        """Find misuse. Raises TiltflowError; nothing has been written."""
        ...

    def train(self, work: Work) -> Any:
        """Train, with checkpoints; writes nothing else. Of several processes every one does."""
        ...

    def judge(self, model: Any, work: Work) -> Outcome:
        """Save what was trained into the folder, and judge it."""
        ...


def run(
    job: Job,
    out: Path,
    *,
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: bool = False,
    tell: Tell = silent,
    log: str | None = None,
) -> dict[str, Any]:
    """Run a job in the folder ``out``; returns the document that metrics.json holds.

    Several processes train together; only the first claims and writes the folder, judges, and returns something. The global
    generators of PyTorch, NumPy and Python, which the user's code may draw from, are seeded by the job's seed.

    Args:
        job: What to do.
        out: The run folder.
        command: The command line, for the record.
        resume: Continue an interrupted run, exactly; or a finished one, with more rounds.
        overwrite: Replace the run that the folder holds.
        allow_changed: Resume although the user's code, the base's weights, tiltflow or torch have changed.
        tell: Told what is going on: (what, done, total, note).
        log: Where rounds are logged besides: tensorboard, wandb or trackio.

    Raises:
        TiltflowError: misuse, before anything is written; and whatever the job raises.
    """
    started = time.perf_counter()
    try:
        require_report()
    except TiltflowError as error:
        warnings.warn(f"there will be numbers and a verdict, but no report.html: {error}", TiltflowWarning, stacklevel=2)
    require_logger(log)
    if (device := check_device(job.device)) != job.device:
        job = replace(job, device=device)  # type: ignore[type-var]  # every job is a dataclass
    job.check()
    if world().rank > 0:
        help_with(job, out, resume)
        return {}
    config = {"job": job.name, "format": FORMAT, **job.config()}
    head: dict[str, Any] = {"command": command, "seed": job.seed, "device": job.device}
    with RunFolder(out, config, resume, overwrite, job.writes) as folder, Log(log, folder.path, config) as logged:
        fixed = frozenset({SETTINGS}) if allow_changed else None
        work = Work(folder, Checkpoint(folder.checkpoint, identity(config), fixed), tell, logged, head)
        together()
        seed_global_generators(job.seed)
        model = job.train(work)
        leave()
        outcome = job.judge(model, work)
        tensors = {name: v.detach().cpu().contiguous() for name, v in outcome.tensors.items()}
        if tensors:
            write_tensors(folder.path / SAMPLES, tensors)
        result = document(**head, rows=rows_of(outcome, time.perf_counter() - started), verdict=status(outcome.verdict))
        folder.write_json("metrics.json", result)
        tell("report", 0, 2, "")
        try:
            page = page_of(outcome, command, config)
            tell("report", 1, 2, "")
            write_page(folder.path, page)
        except Exception as error:  # the numbers are safe; what went wrong with the page is said in them
            result["rows"].append({"kind": "note", "report_error": f"{type(error).__name__}: {error}"})
            folder.write_json("metrics.json", result)
        tell("report", 2, 2, "")
    return result


def help_with(job: Job, out: Path, resume: bool) -> None:
    """What every process but the first does of a run: train, and write nothing."""
    together()  # the first has claimed the folder
    folder = RunFolder(out, {}, resume)
    seed_global_generators(job.seed)
    job.train(Work(folder, Checkpoint(folder.checkpoint), silent, None, {}))
    leave()


def identity(config: Mapping[str, Any]) -> dict[str, str]:
    """Whose a checkpoint is: hashes of the settings, but for the rounds, and of the code that they name, and versions."""

    def fixed(value: Any) -> Any:
        return {k: fixed(v) for k, v in value.items() if k != MORE} if isinstance(value, dict) else value

    text = json.dumps(finite(fixed(config)), sort_keys=True)
    own = {f"the code in {file}": digest for file, digest in sources(config).items()}
    versions = {"tiltflow's version": __version__, "torch's version": torch.__version__}
    return {SETTINGS: hashlib.sha256(text.encode()).hexdigest(), **own, **versions}


def rows_of(outcome: Outcome, seconds: float) -> list[Row]:
    """The rows of metrics.json: the summary, the verdict's lines, the job's own, the rounds."""
    verdict = outcome.verdict or Verdict("pass", [])
    scores = {
        f"{score.name}_{part}": getattr(score, part)
        for score in verdict.scores
        for part in Score._fields[1:]
        if getattr(score, part) is not None
    }
    summary = {"kind": "summary", **outcome.summary, **scores, "seconds": seconds}
    lines = [{"kind": "verdict", **line._asdict()} for line in verdict.lines]
    return [summary, *lines, *outcome.rows, *({"kind": "iteration", **scalars(r)} for r in outcome.history)]


def report(outcome: Outcome, folder: Path | str, config: Mapping[str, Any]) -> Path:
    """Write the report of a model that was trained in Python into a folder, which is made if there is none."""
    require_report()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return write_page(target, page_of(outcome, "from Python", config))


def page_of(outcome: Outcome, command: str, config: Mapping[str, Any]) -> Page:
    """The page of an outcome."""
    blocks, training = outcome.draw()
    return Page(
        title=outcome.title,
        command=command,
        verdict=outcome.verdict,
        blocks=blocks,
        config=flat(config),
        notes=outcome.notes,
        history=outcome.history,
        version=__version__,
        training=training,
        facts=outcome.facts,
    )


def flat(config: Mapping[str, Any]) -> Row:
    """The fields of a config, then those of the settings in it."""
    inner = [flat(v) for v in config.values() if isinstance(v, dict)]
    return {k: v for k, v in config.items() if not isinstance(v, dict)} | {k: v for part in inner for k, v in part.items()}


def status(verdict: Verdict | None) -> str | None:
    """The answer, if there is one."""
    return None if verdict is None else verdict.status


def scalars(row: Row) -> Row:
    """A row without its lists."""
    return {k: v for k, v in row.items() if not isinstance(v, list)}
