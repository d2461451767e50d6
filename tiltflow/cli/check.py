"""The command that checks a base before anything is built on it."""

from __future__ import annotations

from typing import Any

import click
import torch

from tiltflow.cli.common import base_options, check_device, common, document, finish, parse_shape, table
from tiltflow.core.errors import TiltflowError


@click.command("check-base")
@base_options
@click.option("--conditions", help="Draws conditions, module:function (n, generator) → {name: (n, …)}.")
@click.option("--samples", default=1_000, show_default=True, help="Samples of the base to use.")
@click.option("--steps", default=20, show_default=True, help="Simulation steps.")
@common
def check_base_command(
    base: str, predicts: Any, interpolant: str, shape: str | None, label: int | None, guidance: float,
    conditions: str | None, samples: int, steps: int, seed: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Is the base what it is said to be? Shapes, ends of time, direction of time, predictor, path, chain."""
    from tiltflow.run.names import import_function
    from tiltflow.tilting.names import load_base
    from tiltflow.verdict.check_base import check_base

    process = load_base(base, predicts, interpolant, parse_shape(shape), label, guidance)
    if isinstance(process.model, torch.nn.Module):
        process.model.to(check_device(device))
    draw = import_function(conditions) if conditions else None
    if draw is not None and not callable(draw):
        raise TiltflowError(f"--conditions {conditions!r} is a {type(draw).__name__}, not callable.")
    generator = torch.Generator(check_device(device)).manual_seed(seed)
    found = check_base(process, generator=generator, samples=samples, conditions=draw, steps=steps)
    rows = [{"kind": "check", **line._asdict()} for line in found.lines]
    text = f"{table(rows, ['status', 'name', 'value', 'threshold', 'explanation'])}\n\nverdict: {found.status}"
    finish(document(seed, device, rows, found.status), as_json, text)
