"""Tables of what things cost: a round and its parts, networks, memory, plans beside what came, and a GPU."""

from __future__ import annotations

from layout import load, number, plain, rows_of, table

PLANNED = ("demo", "gmm40", "dw4")
SKIPPED = ("subject", "question", "status", "seconds", "error", "at", "peak_mb")
"""What has a column of its own, or none, in the table of a GPU."""


def iteration() -> str:
    """One round of Adjoint Matching."""
    documents = load("iteration.json")
    times = ("median_ms", "lowest_ms", "highest_ms", "processor_ms")
    lines = [
        ["path weights" if r["importance"] else "plain", str(r["regressed"]), *(f"{r[c]:.0f}" for c in times)]
        for r in rows_of(documents, kind="round")
    ]
    header = ["Adjoint Matching", "steps in the loss", "median ms", "lowest", "highest", "processor ms"]
    return table(header, lines, documents)


def overhead() -> str:
    """The parts of a round beside their bare network calls."""
    documents, columns = load("iteration.json"), {"ms": 0, "bare_ms": 0, "ratio": 2, "processor_ratio": 2}
    lines = [
        [r["network"], r["part"], *(number([r[c]], digits) for c, digits in columns.items())]
        for r in rows_of(documents, kind="overhead")
    ]
    return table(["network", "part", "ms", "bare calls, ms", "ratio", "of processor time"], lines, documents)


def particle_network() -> str:
    """The dense particle network beside a scatter-based one that computes the same function, and the MLP."""
    parts = {"ms": 1, "reference_ms": 1, "ratio": 2}
    columns = {f"{what}_{c}": digits for what in ("forward", "step") for c, digits in parts.items()}
    return plain("particle-network.json", ("system", "batch"), columns)


def pipeline_memory() -> str:
    """Peak memory of fine-tuning a pipeline against the number of steps."""
    return plain("pipeline-memory.json", ("method", "steps"), {"peak_mb": 0, "stored_mb": 1})


def device_copies() -> str:
    """What a round asks of the host."""
    return plain("device-copies.json", ("job", "method"), {"copies": 0, "waits": 0, "each_step": 1})


def plan() -> str:
    """Plans beside the runs that followed."""
    documents, lines = load("plan-*.json"), []
    for r in rows_of(documents):
        for what, digits in (("seconds", 0), ("processor_seconds", 0), ("peak_mb", 0), ("disk_mb", 1), ("energies", 0)):
            if r[what] is not None:
                numbers = [number([r[f"{what}{of}"]], n) for of, n in (("_planned", digits), ("", digits), ("_ratio", 2))]
                lines.append([r["job"], str(r["rounds"]), what.replace("_", " "), *numbers])
    missing = [name for name in PLANNED if not rows_of(documents, job=name)]
    return table(["job", "rounds", "of", "planned", "came", "ratio"], lines, documents, {"": missing})


def gpu() -> str:
    """What a GPU was asked."""
    documents, lines = load("gpu-*.json"), []
    for d in documents:
        for r in d["rows"]:
            found = {k: v for k, v in r.items() if k not in SKIPPED}
            said = r.get("error") or ", ".join(f"{k} {_short(v)}" for k, v in found.items())
            lines.append([d["card"], r["subject"], r["question"], r["status"], number([r.get("peak_mb")], 0), said])
    return table(["card", "of", "question", "answer", "peak MB", "numbers"], lines, documents)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
