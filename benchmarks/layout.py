"""How tables of the docs are laid out: result files, mean ± spread, Markdown, what was not run, what made the figures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tiltflow.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
GLUE = "\N{NO-BREAK SPACE}"

RENAMED = {"adjoint_matching": "adjoint_matching_endpoint", "adjoint_matching_weighted": "adjoint_matching"}
"""Names of methods in the files below → names in the registry."""
OLD_NAMES = frozenset(
    f"{bench}-{seed}.json"
    for bench, seeds in {"tilt": 2, "methods-tilt": 3, "methods-digits": 2, "control": 2}.items()
    for seed in range(seeds)
)
"""Result files written before the renaming."""


def renamed(document: Row, file: str, registry: dict[str, Any]) -> Row:
    """``document`` with today's names of methods; as it is if ``file`` is newer or ``registry`` has the old names."""
    if file not in OLD_NAMES or "adjoint_matching_endpoint" not in registry:
        return document
    rows = [r | {"method": RENAMED.get(r["method"], r["method"])} if "method" in r else r for r in document["rows"]]
    return document | {"rows": rows}


def load(pattern: str) -> list[Row]:
    """Every result document whose file name matches, in the order of the names."""
    return [renamed(json.loads(p.read_text(encoding="utf-8")), p.name, METHODS) for p in sorted(RESULTS.glob(pattern))]


def rows_of(documents: list[Row], **only: Any) -> list[Row]:
    """The rows of all documents that have these values."""
    return [r for d in documents for r in d["rows"] if all(r.get(k) == v for k, v in only.items())]


def number(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, or the only value, or a dash."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f"{GLUE}±{GLUE}{stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


def beside(value: str, reference: str) -> str:
    """A value with what it is read against in brackets: its floor, the exact answer, an interval."""
    return value if reference == "–" else f"{value} ({reference})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])


def folded(summary: str, items: list[str]) -> str:
    """A list behind a line that opens it."""
    lines = "\n".join(f"- {item}" for item in items)
    return f'<details markdown="1"><summary>{summary}</summary>\n\n{lines}\n\n</details>'


def absent(missing: dict[str, list[str]]) -> list[str]:
    """The line "Not run" with methods by problem ("" where there is but one problem); nothing if nothing is missing."""
    missing = {problem: names for problem, names in missing.items() if names}
    if not missing:
        return []
    if set(missing) == {""}:
        return [f"Not run: {', '.join(missing[''])}."]
    total = sum(len(names) for names in missing.values())
    return [folded(f"Not run: {total}", [f"{problem}: {', '.join(names)}" for problem, names in missing.items()])]


def provenance(documents: list[Row]) -> str:
    """Commands, commits and durations behind a table."""
    seen = []
    for d in documents:
        seconds = d.get("duration")
        spent = "duration not recorded" if seconds is None else f"{seconds:.0f} s"
        seen.append(f"`{d['command']}` (commit {d.get('commit')}, {spent})")
    if len(seen) == 1:
        return f"From {seen[0]}."
    return folded(f"From {len(seen)} runs", seen)


def table(
    header: list[str],
    rows: list[list[str]],
    documents: list[Row],
    missing: dict[str, list[str]] | None = None,
    more: bool = False,
) -> str:
    """The table, what was not run and the commands behind it; ``more``: the table alone, of the runs of the one above it."""
    if not rows:
        return "Not run."
    about = [] if more else [*absent(missing or {}), provenance(documents)]
    return "\n\n".join([markdown(header, rows), *about])


def column(rows: list[Row], name: str, digits: int = 3) -> str:
    """One column over the seeds of a row."""
    return number([r.get(name) for r in rows], digits)


def with_reference(rows: list[Row], name: str, reference: str, digits: int = 3) -> str:
    """A column with another one in brackets."""
    return beside(column(rows, name, digits), column(rows, reference, digits))


def seeds(found: list[Row], done: list[Row], failure: str) -> str:
    """How many seeds ended, and how many did not."""
    return f"{len(done)}" + (f", {len(found) - len(done)} {failure}" if len(done) < len(found) else "")


def plain(pattern: str, labels: tuple[str, ...], columns: dict[str, int], header: dict[str, str] | None = None) -> str:
    """A table that shows result rows one by one: labels as they are, ``columns`` with their digits."""
    documents = load(pattern)
    lines = [
        [*(str(r[name]) for name in labels), *(number([r.get(c)], digits) for c, digits in columns.items())]
        for r in rows_of(documents)
    ]
    return table([*((header or {}).get(name, name) for name in labels), *columns], lines, documents)
