"""Commands for diffusers pipelines: fine-tune one into an adapter, and merge an adapter for export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiltflow.cli.common import common, document, finish, finish_run, require_new, run_job, scores_of
from tiltflow.cli.options import given, options, run_options
from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.settings import PipelineConfig, PipelineSettings

if TYPE_CHECKING:
    from tiltflow.pipelines.job import PipelineJob


def pipeline_job(pipeline: str, reward: str, file: Path, **values: Any) -> PipelineJob:
    """The job of the command's options."""
    from tiltflow.pipelines.prompts import read_prompts

    chosen = given(values, PipelineConfig)
    training = PipelineSettings.of(chosen.get("method", PipelineConfig.method), **given(values, PipelineSettings))
    config = {"pipeline": pipeline, "reward": reward, "prompts": tuple(read_prompts(file)), **chosen, "settings": training}
    PipelineConfig(**config)
    from tiltflow.pipelines.job import PipelineJob

    return PipelineJob(**config)


@click.command("finetune-pipeline")
@click.argument("pipeline")
@click.option("--reward", required=True, help="module:function or file.py:function, (images or audio, texts) → (n,)")
@click.option("--prompts", "file", type=click.Path(path_type=Path), required=True, help="File: .txt, .jsonl or .csv")
@options(PipelineConfig, PipelineSettings, leave=("pipeline", "reward", "prompts", "settings"))
@run_options
def finetune_pipeline_command(
    pipeline: str, reward: str, file: Path, out: Path, resume: bool, overwrite: bool, log: str | None, as_json: bool,
    **values: Any,
) -> None:  # fmt: skip
    """Fine-tune a diffusers PIPELINE (a folder) towards a reward; OUT/adapter holds a LoRA for stock diffusers.

    With --rank none all weights are trained, and OUT/pipeline holds the whole pipeline.
    """
    result = run_job(pipeline_job(pipeline, reward, file, **values), out, resume, overwrite, log)
    finish_run(result, out, scores_of(result["rows"][0]), ["", "base", "reached"], as_json)


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the merged pipeline; must not exist")
@common
def export_command(run: Path, out: Path, seed: int, device: str, as_json: bool) -> None:
    """Merge the adapter of a finished finetune-pipeline RUN into its pipeline: a folder that stock diffusers loads."""
    require_new(out)
    from tiltflow.run.device import check_device
    from tiltflow.run.open import open_run

    job = open_run(run)
    if not hasattr(job, "export"):
        raise TiltflowError(f"{run} is a run of {job.name}: only those of finetune-pipeline are exported.")
    job.export(run, out, check_device(device))
    finish(document(seed, device, [{"kind": "export", "out": str(out)}], None), as_json, f"merged pipeline: {out}")
