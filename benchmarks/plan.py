"""Plans beside what came: ``python benchmarks/plan.py --jobs JOB --out benchmarks/results/plan-JOB.json``

Each job is planned as `tiltflow plan` does it, and run right after, in a process of its own: the demo, and two samplers with
few rounds. The claim: seconds (at the rounds that the run took), peak memory and disk are within 30 %. On a machine that
others use too, seconds differ by what was left of its processors, and processor seconds are what can be compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tiltflow.bench.result import Row, publish
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.run.job import run
from tiltflow.run.memory import forget_peak, peak
from tiltflow.run.plan import Planned, plan
from tiltflow.sampling.job import SamplerJob
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.tilting.job import TiltJob
from tiltflow.tilting.settings import FinetuneSettings, suited

ROUNDS = 30


def demo() -> TiltJob:
    """What ``make demo`` runs."""
    return TiltJob(strength=3.0, settings=FinetuneSettings.of(suited=suited("digits")))


def sampler(name: str) -> SamplerJob:
    """A sampler of a problem, with few rounds."""
    settings = SamplerSettings.of(suited=ENERGY_PROBLEMS[name]().settings, rounds=ROUNDS)
    return SamplerJob(problem=name, settings=settings)


def carried_out(job: Planned) -> Row:
    """What the job took, in this process."""
    device = torch.device(job.device)
    started, busy = time.perf_counter(), time.process_time()
    forget_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        document = run(job, Path(folder) / "run")
        seconds, high = time.perf_counter() - started, peak(device)
        busy = time.process_time() - busy
        disk = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    summary = document["rows"][0]
    return {
        "rounds": sum(row["kind"] == "iteration" for row in document["rows"]),
        "seconds": seconds,
        "processor_seconds": busy,
        "peak_mb": None if high is None else high / 2**20,
        "disk_mb": disk / 2**20,
        "energies": summary.get("energy_evaluations"),
    }


def compared(name: str, job: Planned) -> Row:
    """A row: planned, real, and their ratios."""
    started = time.perf_counter()
    found = plan(job)
    spent = time.perf_counter() - started
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        real = pool.submit(carried_out, job).result()
    whole = found.estimate(real["rounds"])
    planned: dict[str, Any] = {
        "seconds": whole["seconds"],
        "processor_seconds": whole["seconds"] * found.busy,
        "peak_mb": max(found.peaks().values(), default=0) / 2**20,
        "disk_mb": found.disk / 2**20,
        "energies": whole["energies"],
    }
    row: Row = {"job": name, "rounds": real["rounds"], "fewest": found.fewest, "most": found.most, "plan_seconds": spent}
    for what, value in planned.items():
        row |= {f"{what}_planned": value, what: real[what]}
        row[f"{what}_ratio"] = value / real[what] if real[what] else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="demo,gmm40,dw4", help="names with commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started, rows = time.perf_counter(), []
    for name in arguments.jobs.split(","):
        rows.append(compared(name, demo() if name == "demo" else sampler(name)))
    publish(rows, 0, arguments.out, started, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
