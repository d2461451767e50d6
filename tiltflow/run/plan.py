"""What a job will cost, before it is run: seconds, memory, energies and disk, from two trials of it.

A trial is the job itself with two rounds (the first warms up) and a share of the samples that are judged, in a process of
its own and a folder that is thrown away. By how much a part of the job grew from the smaller share to the larger one, it
grows in proportion up to the whole; a round is repeated. On a CPU growth is told from processor seconds, which the work of
others on the machine hardly changes, and turned into seconds as the trials' own were.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch

from tiltflow.core.progress import Tell, silent
from tiltflow.run.folder import CHECKPOINT
from tiltflow.run.job import Job, Row, run
from tiltflow.run.memory import forget_peak, peak
from tiltflow.train.criterion import EARLIEST
from tiltflow.train.settings import Training
from tiltflow.train.store import load_state

START, ROUNDS = "start", ("fine-tuning", "training")
"""What comes before anything is told, with what warms up; what jobs call their rounds."""
CONSTANT = (START, "variances of the chain", "report")
"""Parts that the share does not change."""
ROUND = "a round"
"""What one of them is called here."""
SHARES = (0.0, 0.15)
"""Of what is judged; the first is as little as can be."""
LINK, NETWORK, NODE = 300e9, 50e9, 8
"""Bytes per second between the GPUs of a machine, and between machines; GPUs of a machine."""
SIZES = (8, 64)
MODEL = (
    "Several processes, a model: each has such a device and takes its share of the paths of a round; gradients are "
    f"all-reduced in every step, 2(n−1)/n of their bytes at {LINK / 1e9:.0f} GB/s, beyond {NODE} processes at "
    f"{NETWORK / 1e9:.0f} GB/s; all but the rounds is done by one."
)


class Planned(Job, Protocol):
    """A job that can be planned."""

    @property
    def training(self) -> Training:
        """How it trains."""
        ...

    def trial(self, training: Mapping[str, Any], share: float) -> tuple[Self, float]:
        """The same with other settings of the training and that share of what is judged or prepared, and the share it is."""
        ...


class Spent(NamedTuple):
    """Seconds by the clock, and of work: of all processors on a CPU, elsewhere the same."""

    clock: float = 0.0
    work: float = 0.0

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        """The sum, or the difference."""
        return Spent(self.clock + sign * other.clock, self.work + sign * other.work)


class Trial(NamedTuple):
    """What was measured.

    Args:
        share: Of what is judged.
        spent: By part, without the rounds.
        peaks: Bytes by part.
        files: Bytes by name.
        rounds: Of each.
        checkpoint: Seconds that one takes to be written.
        kept: Bytes that it grows by per round.
        weights: Bytes of what is trained.
        energies: That a round evaluates; None: there are none.
        bound: Whether rounds tell what the criterion for their end needs.
        busy: Processors that worked, on average: fewer than threads where others use them too.
    """

    share: float
    spent: dict[str, Spent]
    peaks: dict[str, int | None]
    files: dict[str, int]
    rounds: list[Spent]
    checkpoint: float
    kept: int
    weights: int
    energies: float | None
    bound: bool
    busy: float


class Clock:
    """Told what is going on: what is spent and the peak memory, part by part."""

    def __init__(self, device: torch.device, checkpoint: Path) -> None:
        self.device, self.checkpoint = device, checkpoint
        self.parts: list[tuple[str, Spent]] = []
        self.peaks: dict[str, int | None] = {}
        self.before = 0
        self.last = self.now()
        forget_peak(device)

    def now(self) -> Spent:
        """Since whenever."""
        clock = time.perf_counter()
        return Spent(clock, time.process_time() if self.device.type == "cpu" else clock)

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """A part goes on."""
        now, high = self.now(), peak(self.device)
        part = what if self.parts or what in ROUNDS else START
        self.parts.append((part, now.plus(self.last, -1)))
        self.peaks[part] = high if high is None else max(high, self.peaks.get(part) or 0)
        if what in ROUNDS and self.checkpoint.is_file():
            self.before = self.checkpoint.stat().st_size
        forget_peak(self.device)
        self.last = now


def measure(job: Planned, share: float) -> Trial:
    """A trial of the job, in this process."""
    trial, share = job.trial({"rounds": 2, "checkpoint_every": 1, "tolerance": None, "minutes": None}, share)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        clock = Clock(torch.device(job.device), out / CHECKPOINT)
        started, busy = time.perf_counter(), time.process_time()
        document = run(trial, out, tell=clock)
        busy = (time.process_time() - busy) / (time.perf_counter() - started)
        files = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
        weights = load_state(out / CHECKPOINT)["weights"] if CHECKPOINT in files else []
    history = [row for row in document["rows"] if row["kind"] == "iteration"]
    work = "processor_seconds" if clock.device.type == "cpu" else "seconds"
    rounds = [Spent(row["seconds"], row[work]) for row in history]
    told = [one for part, one in clock.parts if part in ROUNDS]
    spent: dict[str, Spent] = {}
    for part, one in clock.parts:
        if part not in ROUNDS:
            spent[part] = spent.get(part, Spent()).plus(one)
    if rounds:
        spent[START] = spent.get(START, Spent()).plus(told[0]).plus(rounds[-1], -1)  # what warms up, too
    energies = document["rows"][0].get("energy_evaluations", document["rows"][0].get("energy_calls"))
    return Trial(
        share=share,
        spent=spent,
        peaks=clock.peaks,
        files=files,
        rounds=rounds,
        checkpoint=sum(one.clock for one in told[1:]) - sum(one.clock for one in rounds[1:]),
        kept=max(0, files.get(CHECKPOINT, 0) - clock.before) if clock.before else 0,
        weights=sum(w.numel() * w.element_size() for w in weights),
        energies=None if energies is None else energies / max(len(rounds), 1),
        bound=any("elbo" in row for row in history),
        busy=busy,
    )


def plan(job: Planned, tell: Tell = silent, apart: bool = True) -> Plan:
    """Plan a job.

    Args:
        job: What to do; it is checked first, as when it is run.
        tell: Told what is going on: (what, done, total, note).
        apart: Measure in processes of their own, whose memory is the job's alone; or in this one.

    Raises:
        TiltflowError: what the job's checks find, and whatever it raises.
    """
    trials: list[Trial] = []
    for i, share in enumerate(SHARES):
        tell("trials", i, len(SHARES), "")
        share = min(1.0, max(share, 2 * trials[0].share)) if trials else share
        trials.append(_alone(job, share) if apart else measure(job, share))
    tell("trials", len(SHARES), len(SHARES), "")
    return Plan(job.training, torch.device(job.device), *trials)


def _alone(job: Planned, share: float) -> Trial:
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(measure, job, share).result()


@dataclass(frozen=True)
class Plan:
    """What a job will cost.

    Args:
        training: How it trains.
        device: Where.
        less: The trial with the smaller share.
        more: The one with the larger share.
    """

    training: Training
    device: torch.device
    less: Trial
    more: Trial

    @property
    def most(self) -> int:
        """Rounds at most."""
        return self.training.rounds if self.more.rounds else 0

    @property
    def fewest(self) -> int:
        """Rounds at least: the earliest end, if a criterion may end the training."""
        ends = self.training.tolerance is not None and self.more.bound
        return min(self.most, EARLIEST) if ends else self.most

    @property
    def round_seconds(self) -> float:
        """Of one round, when all is warm, with its share of a checkpoint."""
        every = [*self.less.rounds, *self.more.rounds]
        if not every:
            return 0.0
        warm = [one.work for one in (*self.less.rounds[1:], *self.more.rounds[1:])]
        written = (self.less.checkpoint + self.more.checkpoint) / 2 / self.training.checkpoint_every
        return sum(warm) / len(warm) * _clock_over_work(*every) + written

    @property
    def busy(self) -> float:
        """Processors that worked, on average."""
        return (self.less.busy + self.more.busy) / 2

    def parts(self) -> dict[str, float]:
        """Seconds of all but the rounds."""
        less, more = self.less.spent, self.more.spent
        works = [{what: one.work for what, one in spent.items()} for spent in (less, more)]
        found = self._whole(*works)
        found |= {what: (works[0][what] + works[1][what]) / 2 for what in CONSTANT if what in found}
        return {what: work * _clock_over_work(less.get(what, Spent()), more[what]) for what, work in found.items()}

    def peaks(self) -> dict[str, float]:
        """Peak bytes by part, those of the rounds by one name; {} where they cannot be measured.

        While a checkpoint is written, what it holds is in memory twice.
        """
        if None in self.more.peaks.values():
            return {}
        found = self._whole(self.less.peaks, self.more.peaks)
        rounds = [max(self.less.peaks[what] or 0, self.more.peaks[what] or 0) for what in ROUNDS if what in found]
        rest = {what: size for what, size in found.items() if what not in ROUNDS}
        return {ROUND: max(rounds) + 2 * self._growth, **rest} if rounds else rest

    @property
    def disk(self) -> float:
        """Bytes of the run folder."""
        return sum(self._whole(self.less.files, self.more.files).values()) + self._growth

    @property
    def _growth(self) -> float:
        """Bytes that the rounds in the buffer add to a checkpoint."""
        kept = min(self.most, self.training.buffer_rounds) - len(self.more.rounds)
        return self.more.kept * max(0, kept)

    def _whole(self, less: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, float]:
        """At the share 1, part by part."""
        apart = self.more.share - self.less.share
        steps = (1 - self.more.share) / apart if apart > 0 else 0.0
        return {what: more[what] + max(0.0, more[what] - less.get(what, more[what])) * steps for what in more}

    def estimate(self, rounds: int | None = None, processes: int = 1) -> Row:
        """Seconds and energies of the job.

        Args:
            rounds: Of training; None: at most.
            processes: How many GPUs, by :data:`MODEL`.
        """
        rounds = self.most if rounds is None else rounds
        speed = LINK if processes <= NODE else NETWORK
        wire = self.training.gradient_steps * 2 * (processes - 1) / processes * self.more.weights / speed
        train = rounds * (self.round_seconds / processes + wire)
        if self.training.minutes is not None:
            train = min(train, 60 * self.training.minutes)
        rest = sum(self.parts().values())
        each = self.more.energies
        return {
            "processes": processes,
            "rounds": rounds,
            "seconds": train + rest,
            "train_seconds": train,
            "energies": None if each is None else round(each * rounds),
        }

    def rows(self) -> list[Row]:
        """All of it: the whole job, also on several GPUs, and its parts."""
        peaks, counts = self.peaks(), sorted({self.fewest, self.most})
        whole = [self.estimate(rounds) for rounds in counts] + [self.estimate(processes=n) for n in SIZES]
        size = {"peak_mb": max(peaks.values()) / 2**20 if peaks else None, "disk_mb": self.disk / 2**20, "busy": self.busy}
        said = {self.fewest: "earliest end", self.most: "at most"} if len(counts) > 1 else {}
        parts = {ROUND: self.round_seconds, **self.parts()}
        return [
            *({"kind": "plan", "ends": said.get(row["rounds"]), **row, **size} for row in whole),
            *({"kind": "part", "part": part, "seconds": v, "peak_mb": _mb(peaks, part)} for part, v in parts.items()),
            {"kind": "note", "model": MODEL},
        ]


def _mb(peaks: Mapping[str, float], part: str) -> float | None:
    return peaks[part] / 2**20 if part in peaks else None


def _clock_over_work(*spent: Spent) -> float:
    work = sum(one.work for one in spent)
    return sum(one.clock for one in spent) / work if work > 0 else 0.0
