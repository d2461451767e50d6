"""The command that checks a base before anything is built on it."""

from __future__ import annotations

from typing import Any

import click

from tiltflow.cli.common import Bars, common, document, finish, table
from tiltflow.cli.finetune import named_base
from tiltflow.cli.options import options, trust_option
from tiltflow.tilting.settings import TiltConfig

CHECKED = ("base", "conditions", "predicts", "interpolant", "shape", "label", "guidance")
"""Fields of a fine-tuning that its base alone needs."""


@click.command("check-base")
@options(TiltConfig, leave=tuple(f for f in TiltConfig.__dataclass_fields__ if f not in CHECKED))
@click.option("--samples", type=click.IntRange(200, 1_000_000), default=1_000, show_default=True, help="Samples to use.")
@click.option("--steps", type=click.IntRange(2, 100_000), default=20, show_default=True, help="Simulation steps.")
@trust_option
@common
def check_base_command(samples: int, steps: int, seed: int, device: str, as_json: bool, **values: Any) -> None:
    """Is the base what it is said to be? Shapes, ends of time, direction of time, predictor, path, chain."""
    fields = named_base(values)
    TiltConfig(**fields, seed=seed)
    import torch

    from tiltflow.run.device import check_device
    from tiltflow.run.names import import_callable
    from tiltflow.tilting.job import TiltJob
    from tiltflow.verdict.check_base import check_base

    job = TiltJob(**fields, seed=seed, device=check_device(device))
    draw = None if job.conditions is None else import_callable(job.conditions, "the provider of conditions")
    generator = torch.Generator(device).manual_seed(seed)
    bars = Bars()
    found = check_base(job.load_base(), generator=generator, samples=samples, conditions=draw, steps=steps, tell=bars)
    bars.close()
    rows = [{"kind": "check", **line._asdict()} for line in found.lines]
    text = f"{table(rows, ['status', 'name', 'value', 'threshold', 'explanation'])}\n\nverdict: {found.status}"
    finish(document(seed, device, rows, found.status), as_json, text)
