"""Keep the training curve of a finished sampler's run, as a benchmark result.

    tiltflow train-sampler lj55 --rounds 210 --samples 300 --out runs/lj55
    python benchmarks/training_curve.py runs/lj55 --out benchmarks/results/training-curve-lj55.json

Rows: the run's summary (distances beside their floors, of fewer samples than ``bench sampling`` draws), then one per round
with the median energy of its end points and the time that it took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tiltflow.bench.result import write_result

KEPT = ("kind", "iteration", "energy", "ess", "kl", "loss", "seconds", "processor_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of tiltflow train-sampler")
    parser.add_argument("--out", type=Path, required=True, help="result to write")
    args = parser.parse_args()
    document = json.loads((args.run / "metrics.json").read_text(encoding="utf-8"))
    summary = document["rows"][0]
    rounds = [{k: row[k] for k in KEPT if k in row} for row in document["rows"] if row["kind"] == "iteration"]
    write_result(args.out, document | {"rows": [summary, *rounds]}, summary["seconds"])


if __name__ == "__main__":
    main()
