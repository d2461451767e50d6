"""``tiltflow list``: what can be named."""

from __future__ import annotations

from typing import Any

import click

from tiltflow.cli.common import common, document, finish, table
from tiltflow.methods.registry import ROWS

WHAT = ("methods", "problems", "energies", "rewards", "bases")


@click.command("list")
@click.argument("what", type=click.Choice(WHAT), nargs=-1)
@common
def list_command(what: tuple[str, ...], seed: int, device: str, as_json: bool) -> None:
    """What can be named: methods with their bias and needs, problems, energies of molecules, rewards and bases."""
    rows: list[dict[str, Any]] = []
    for kind in what or WHAT:
        rows += [{"kind": kind, **row} for row in _rows(kind)]
    shown = []
    for kind in what or WHAT:
        found = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]
        shown.append(f"{kind}\n\n{table(found, list(found[0]))}")
    finish(document(seed, device, rows, None), as_json, "\n\n".join(shown))


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind == "methods":
        return [
            {
                "name": row.name,
                "for": ", ".join(row.jobs),
                "trains": row.trained,
                "needs": ", ".join(row.needs) or "values only",
                "on_policy": row.on_policy,
                "bias": row.bias or "none",
                "paper": row.paper,
            }
            for row in ROWS
        ]
    if kind == "problems":
        from tiltflow.energies import ENERGY_PROBLEMS
        from tiltflow.problems.tilt import TILT_PROBLEMS

        return [_about(name, make, "sample") for name, make in ENERGY_PROBLEMS.items()] + [
            _about(name, make, "bench tilt") for name, make in TILT_PROBLEMS.items()
        ]
    if kind == "energies":
        from tiltflow.molecules.settings import ENERGIES

        return [{"name": name, "is": said} for name, said in ENERGIES.items()]
    if kind == "rewards":
        from tiltflow.digits.settings import REWARDS

        return [{"name": name, "is": said} for name, said in REWARDS.items()]
    from tiltflow.digits.settings import BASE

    return [{"name": BASE, "is": "class-conditional digits, 28 × 28, shipped"}]


def _about(name: str, make: Any, use: str) -> dict[str, Any]:
    return {"name": name, "for": use, "is": (make.__doc__ or "").strip().split("\n")[0]}
