"""The verdict on conformers: can the weights be told? Rows of numbers in, lines out.

    path weights ESS    of all samples drawn, the worst molecule's: ≥ .3 good, < .05 cannot tell
    left out            share of conformers with a fault, the worst molecule's: ≤ .01 good
    labels              bonds, rings and nitrogens whose states are neither sampled nor enumerated: none, or cannot tell

What is left out has no weight, and counts in the ESS. A good ESS is necessary, not sufficient: path weights come from the
sampler's own paths, and do not miss shapes that it never visits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltflow.verdict.line import Line, Status, Verdict, overall

RELIABLE = 0.05
"""Least ESS fraction at which weights are stated."""
GOOD_ESS, GOOD_SHARE = 0.3, 0.01
NAMED = 5
"""Most molecules that a line names."""


def judge_conformers(rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict on molecules, one row each; None where no conformer has a weight, as of those chosen to cover.

    Args:
        rows: "name", "conformers" (kept), "rejected" (left out), "ess" (None: no weights), "unsampled" labels.
    """
    weighted = [row for row in rows if row["ess"] is not None]
    if not weighted:
        return None
    lines = [_ess(weighted), _left_out(weighted), *_labels(weighted)]
    return Verdict(overall(lines), lines)


def _ess(rows: Sequence[Mapping[str, Any]]) -> Line:
    worst = min(rows, key=lambda row: row["ess"])
    value = worst["ess"]
    status: Status = "pass" if value >= GOOD_ESS else "warn" if value >= RELIABLE else "cannot tell"
    text = "effective share of all samples drawn; it does not tell of shapes that the sampler never visits"
    if len(rows) > 1:
        below = [str(row["name"]) for row in rows if not row["ess"] >= RELIABLE]
        named = ", ".join([*below[:NAMED], *(["…"] if len(below) > NAMED else [])])
        text = f"the least of {len(rows)} molecules, that of {worst['name']}: {text}"
        text += f". Weights cannot be told of {len(below)}: {named}" if below else ""
    return Line("path weights ESS", value, None, None, f"≥ {GOOD_ESS:g} good, < {RELIABLE:g} unusable", status, text)


def _left_out(rows: Sequence[Mapping[str, Any]]) -> Line:
    worst = max(rows, key=_share)
    value = _share(worst)
    text = f"{worst['rejected']} of {worst['conformers'] + worst['rejected']} conformers have a fault or no weight"
    text += f": {worst['name']}, the worst of {len(rows)} molecules" if len(rows) > 1 else ""
    return Line(
        "conformers left out", value, None, None, f"≤ {GOOD_SHARE:g} good", "pass" if value <= GOOD_SHARE else "warn", text
    )


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """A line only where something was not sampled."""
    stuck = [row for row in rows if row.get("unsampled")]
    if not stuck:
        return []
    text = "; ".join(f"{row['name']}: {row['unsampled']}" for row in stuck[:NAMED])
    text = f"populations depend on states that were neither sampled nor enumerated, of {text}"
    return [Line("molecules with labels not sampled", len(stuck), None, None, "none", "cannot tell", text)]


def _share(row: Mapping[str, Any]) -> float:
    return row["rejected"] / max(row["conformers"] + row["rejected"], 1)
