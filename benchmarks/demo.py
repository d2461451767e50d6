"""The demo over several seeds: ``python benchmarks/demo.py --seeds 0,1,2,3,4``

Fine-tunes the digits towards thickness as ``make demo`` does, in a folder that is thrown away, and writes each run's
document to benchmarks/results/digits-thickness-SEED.json. Goal: the verdict passes on all of them, within four minutes each
on two idle cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from layout import RESULTS

from tiltflow.bench.result import write_result
from tiltflow.cli.common import Bars
from tiltflow.run.job import run
from tiltflow.tilting.job import TiltJob
from tiltflow.tilting.settings import FinetuneSettings, suited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the documents")
    arguments = parser.parse_args()
    for seed in map(int, arguments.seeds.split(",")):
        started, bars = time.perf_counter(), Bars()
        job = TiltJob(strength=3.0, seed=seed, settings=FinetuneSettings.of(suited=suited("digits")))
        with tempfile.TemporaryDirectory() as folder:
            document = run(job, Path(folder) / "run", command=f"python benchmarks/demo.py --seeds {seed}", tell=bars)
        bars.close()
        seconds = time.perf_counter() - started
        write_result(arguments.out / f"digits-thickness-{seed}.json", document, seconds)
        ways = {row["name"]: row["status"] for row in document["rows"] if row["kind"] == "way"}
        print(f"seed {seed}: {document['verdict']} {ways} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
