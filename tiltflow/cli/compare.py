"""``tiltflow compare``: what several strengths bought, from their run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiltflow.cli.common import common, document, finish, require_new, table
from tiltflow.core.errors import TiltflowError


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Picture (PNG): every score against the KL to the base.")
@common
def compare_command(runs: tuple[Path, ...], out: Path | None, seed: int, device: str, as_json: bool) -> None:
    """Compare finished RUNS of finetune or finetune-pipeline that differ in their strength λ: the Pareto picture.

    Take the largest λ at which the held-out judges still rise and the diversity is still what you need.
    """
    if out is not None:
        require_new(out)
    rows = sorted((read_summary(run) for run in runs), key=lambda row: row["strength"])
    names = [key.removesuffix("_reached") for key in rows[0] if key.endswith("_reached")]
    others = [row["run"] for row in rows if any(f"{name}_reached" not in row for name in names)]
    if others:
        raise TiltflowError(f"{others[0]} has other scores than {rows[0]['run']}; compare runs of one reward.")
    if out is not None:
        from tiltflow.report.plots import against_kl
        from tiltflow.train.store import write_bytes

        write_bytes(out, against_kl(rows, names))
    cells = [{"λ": row["strength"], "KL": row["kl"], **{n: row[f"{n}_reached"] for n in names}} for row in rows]
    base = {"λ": 0.0, "KL": 0.0, **{name: rows[0].get(f"{name}_base") for name in names}}
    text = table([base, *cells], ["λ", "KL", *names])
    finish(document(seed, device, rows, None), as_json, text + (f"\n\npicture: {out}" if out else ""))


def read_summary(run: Path) -> dict[str, Any]:
    """λ, KL and the scores of a finished run. Raises TiltflowError if the folder has none."""
    from tiltflow.run.folder import METRICS, read_json

    try:
        found = read_json(run / METRICS)
        row = found["rows"][0]
        if row["kind"] != "summary":
            raise KeyError("summary")
        strength, kl = float(row["strength"]), row["kl"]
    except (TiltflowError, KeyError, IndexError, TypeError, ValueError) as error:
        raise TiltflowError(f"{run} holds no finished run of finetune or finetune-pipeline.") from error
    if not isinstance(kl, int | float):
        raise TiltflowError(f"{run} has no KL to the base, which runs are compared by: was anything trained?")
    scores = {k: v for k, v in row.items() if k.endswith(("_base", "_reached"))}
    known = {"kind": "summary", "run": str(run), "strength": strength, "kl": float(kl)}
    return known | scores | {"verdict": found.get("verdict")}
