"""What a run will cost: ``tiltflow plan COMMAND …``, with the options of the command itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from tiltflow.cli.common import Bars, document, finish, table
from tiltflow.cli.conformers import conformer_training_job, train_conformers_command
from tiltflow.cli.finetune import finetune_command, finetune_job
from tiltflow.cli.options import RUN
from tiltflow.cli.pipeline import finetune_pipeline_command, pipeline_job
from tiltflow.cli.sampling import sampler_job, train_sampler_command

WHOLE = ["processes", "rounds", "ends", "seconds", "train_seconds", "peak_mb", "disk_mb", "energies"]
PARTS = ["part", "seconds", "peak_mb"]


@click.group("plan")
def plan_group() -> None:
    """Seconds, memory, energies and disk of a run, from two short trials. Nothing is written."""


def add(command: click.Command, job_of: Callable[..., Any]) -> None:
    """The plan of a command: its options without those of a run folder."""

    def planned(as_json: bool, **values: Any) -> None:
        job = job_of(**values)
        from tiltflow.run.plan import plan

        bars = Bars()
        rows = plan(job, bars).rows()
        bars.close()
        parts = {kind: [row for row in rows if row["kind"] == kind] for kind in ("plan", "part", "note")}
        busy = f"While this was measured, {parts['plan'][0]['busy']:.2g} processors were at work for it."
        text = f"{table(parts['plan'], WHOLE)}\n\n{table(parts['part'], PARTS)}\n\n{busy} {parts['note'][0]['model']}"
        finish(document(job.seed, job.device, rows, None), as_json, text)

    params = [param for param in command.params if param.name not in RUN]
    help = f"What `tiltflow {command.name}` will cost with these options."
    plan_group.add_command(click.Command(command.name, params=params, callback=planned, help=help))


add(finetune_command, finetune_job)
add(train_sampler_command, sampler_job)
add(finetune_pipeline_command, pipeline_job)
add(train_conformers_command, conformer_training_job)
