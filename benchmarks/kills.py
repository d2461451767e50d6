"""Runs that are killed at random moments: does every folder go on with one command, to the same weights, bit for bit?

``python benchmarks/kills.py --count 20 --seed 0 --out benchmarks/results/kills.json``

A small fine-tuning and a small training of a sampler are run once without a break. Then each is started again and again, and
killed (SIGKILL, or with --signal SIGTERM) at a moment drawn from the time that the whole run took: while it starts, trains,
writes a checkpoint, judges, or writes its report. After each kill the newest checkpoint may be damaged too (--damage: a bit
is flipped, or its end is missing). The one command is the first one with --resume; where it was killed before it had a
folder, the first one itself. The claim: every one of them ends with the weights of the whole run, and no round that was said
to be saved is lost.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.bench.result import Row, publish
from tiltflow.core.errors import TiltflowError
from tiltflow.run.folder import CHECKPOINT, METRICS, read_json
from tiltflow.train.store import load_state, read_tensors

SMALL = ["--batch", "16", "--checkpoint-every", "1", "--samples", "200"]
JOBS = {
    "finetune": [
        "finetune", "--reward", "thickness", "--rounds", "12", "--steps", "5", "--variance-samples", "32",
        "--reference-samples", "200", *SMALL,
    ],
    "train-sampler": [
        "train-sampler", "gaussian2d", "--rounds", "60", "--steps", "8", "--draw-steps", "8", "--hidden", "16",
        "--compared", "100", *SMALL,
    ],
}  # fmt: skip
ATTEMPTS, WEIGHTS = 3, "weights.safetensors"


def started(command: Sequence[str], out: Path, *more: str) -> subprocess.Popen[str]:
    """A run, in a process of its own."""
    call = [sys.executable, "-m", "tiltflow", *command, "--out", str(out), *more]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and the last line that it said."""
    said = child.communicate()[1].strip().splitlines()
    return child.returncode, said[-1] if said else ""


def saved(out: Path) -> int:
    """The round of the newest checkpoint; −1: there is none."""
    return int(load_state(out / CHECKPOINT)["iteration"]) if (out / CHECKPOINT).is_file() else -1


def told(out: Path) -> int:
    """The rounds that metrics.json tells of."""
    if not (out / METRICS).is_file():
        return 0
    return sum(row.get("kind") == "iteration" for row in read_json(out / METRICS)["rows"])


def damage(out: Path, how: str) -> bool:
    """Damage the newest checkpoint, if there is one before it."""
    path = out / CHECKPOINT
    if how == "none" or not (out / "checkpoint.older.safetensors").is_file() or not path.is_file():
        return False
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[-1 - random.randrange(len(content) // 2)] ^= 1 << random.randrange(8)
    path.write_bytes(content if how == "bit" else content[: len(content) // 2])
    return True


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Bit for bit. (Files may differ: safetensors puts the entries of a header in any order.)"""
    return found.keys() == wanted.keys() and all(torch.equal(v, wanted[k]) for k, v in found.items())


def attempt(name: str, seconds: float, wanted: dict[str, Tensor], number: int, how: str, folder: Path) -> Row:
    """One run that is killed, up to three times, and brought to its end."""
    out, moments, rounds = folder / "run", [], []
    more: tuple[str, ...] = ()
    for _ in range(random.randint(1, ATTEMPTS)):
        child = started(JOBS[name], out, *more)
        moments.append(random.uniform(0, seconds))
        try:
            child.wait(moments[-1])
        except subprocess.TimeoutExpired:
            child.send_signal(number)
        ended(child)
        if saved(out) < max(rounds, default=-1):
            return {"job": name, "moments": moments, "fault": f"round {max(rounds)} was lost"}
        damaged = damage(out, how)
        if not damaged:
            rounds.append(saved(out))
        more = ("--resume",) if out.exists() else ()
    code, said = ended(started(JOBS[name], out, *more))
    fault = None if code in (0, 3) else said
    if fault is None and not same(read_tensors(out / WEIGHTS)[0], wanted):
        fault = "other weights"
    return {"job": name, "moments": moments, "saved": rounds, "told": told(out), "fault": fault}


def main() -> None:
    """Kill runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="runs of each job that are killed")
    parser.add_argument("--jobs", nargs="*", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM", "SIGINT"), default="SIGKILL")
    parser.add_argument("--damage", choices=("none", "bit", "half"), default="none", help="of the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    begun, rows = time.perf_counter(), []
    for name in arguments.jobs:
        with tempfile.TemporaryDirectory() as folder:
            clock = time.perf_counter()
            code, said = ended(started(JOBS[name], Path(folder) / "run"))
            seconds = time.perf_counter() - clock
            if code not in (0, 3):
                raise TiltflowError(f"{name} does not even run whole: {said}")
            wanted = read_tensors(Path(folder) / "run" / WEIGHTS)[0]
        for i in range(arguments.count):
            with tempfile.TemporaryDirectory() as folder:
                number = signal.Signals[arguments.signal]
                rows.append(attempt(name, seconds, wanted, number, arguments.damage, Path(folder)))
            print(f"{name} {i + 1}/{arguments.count}: {rows[-1]['fault'] or 'as the whole run'}", file=sys.stderr)
    faults = sum(row["fault"] is not None for row in rows)
    summary = {"kind": "summary", "runs": len(rows), "kills": sum(len(row["moments"]) for row in rows), "faults": faults}
    how = {"signal": arguments.signal, "damage": arguments.damage}
    verdict = "fail" if faults else "pass"
    publish([summary | how, *({"kind": "run", **row} for row in rows)], arguments.seed, arguments.out, begun, verdict)


if __name__ == "__main__":
    main()
