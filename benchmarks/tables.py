"""Write the tables of docs/benchmarks.md from benchmarks/results/*.json: ``python benchmarks/tables.py``.

Everything between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced; a missing result says "not run".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Row = dict[str, Any]

PROBLEMS = ("mixture2d", "mixture2d-rare", "mixture32d", "quadratic2d", "inverse4d")


def load(pattern: str) -> list[Row]:
    """Every result document whose file name matches, oldest name first."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob(pattern))]


def number(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, or the only value, or "not run"."""
    known = [v for v in values if v is not None]
    if not known:
        return "–" if values else "not run"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])


def _duration(document: Row) -> str:
    seconds = document.get("duration")
    return "duration not recorded" if seconds is None else f"{seconds:.0f} s"


def provenance(documents: list[Row]) -> str:
    """Commands, commits and durations behind a table."""
    seen = [
        f"`{d['command']}` (commit {d.get('commit')}, {_duration(d)})" for d in documents
    ]
    return "From: " + "; ".join(seen) + "." if seen else "Not run."


def tilt() -> str:
    """Analytic problems, one line per problem and sampler, mean ± standard deviation over seeds."""
    documents = load("tilt-*.json")
    rows = [row for d in documents for row in d["rows"]]
    columns = ("w2", "w2_floor", "mode_tv", "mode_weight_error", "log_z_error", "ess", "chain_ess", "seconds")
    lines = []
    for problem in PROBLEMS:
        for sampler in ("sde", "ode"):
            found = [r for r in rows if r["problem"] == problem and r["sampler"] == sampler]
            cells = [number([r.get(c) for r in found], 0 if c == "seconds" else 3) for c in columns]
            lines.append([problem, sampler, str(len(found)), *cells])
    return markdown(["problem", "sampler", "seeds", *columns], lines) + "\n\n" + provenance(documents)


def memoryless() -> str:
    """The three noise schedules."""
    documents = load("memoryless-*.json")
    columns = ("residual_correlation", "mode_tv", "w2", "w2_floor")
    names = ("σ = 0.2", "σ = 1", "memoryless")
    lines = []
    for name in names:
        found = [r for d in documents for r in d["rows"] if r["noise"] == name]
        lines.append([name, *(number([r[c] for r in found]) for c in columns)])
    return markdown(["noise", *columns], lines) + "\n\n" + provenance(documents)


def digits() -> str:
    """Fine-tuned digits: base, exact reference, reached."""
    lines, documents = [], load("digits-*.json")
    for d in documents:
        summary = d["rows"][0]
        for name in [k[: -len("_base")] for k in summary if k.endswith("_base")]:
            base, exact, got = (summary[f"{name}_{c}"] for c in ("base", "reference", "reached"))
            gap = f"{100 * (got - exact) / (exact - base):+.0f} %" if exact != base else "–"
            lines.append(
                [
                    summary["reward"],
                    f"{summary['strength']:g}",
                    str(d["seed"]),
                    name,
                    *(f"{v:.3f}" for v in (base, exact, got)),
                    gap,
                    f"{summary['path_ess']:.2f}",
                    str(d["verdict"]),
                ]
            )
    header = ["reward", "λ", "seed", "score", "base", "exact tilt", "reached", "off the gap", "path ESS", "verdict"]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


TABLES: dict[str, Callable[[], str]] = {"tilt": tilt, "memoryless": memoryless, "digits": digits}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
