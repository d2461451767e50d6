"""Commands for diffusers pipelines: fine-tune one into an adapter, and merge an adapter for export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from tiltflow.cli.common import Bars, check_device, command_line, common, document, finish, finish_run
from tiltflow.core.errors import TiltflowError
from tiltflow.run.folder import RunFolder
from tiltflow.train.distributed import join, wait, world

PLACES = ("rollout", "control", "adjoint")


@click.command("finetune-pipeline")
@click.argument("pipeline")
@click.option("--reward", required=True, help="module:function (images or audio, texts) → (n,); file.py:function too.")
@click.option("--judge", "judges", multiple=True, help="Held-out score, as --reward; may be repeated.")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="File: .txt, .jsonl or .csv.")
@click.option("--negative", help="Negative prompt (default: the pipeline's own).")
@click.option("--strength", default=1.0, show_default=True, help="λ ≥ 0.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option("--rounds", default=100, show_default=True, help="Rounds of Adjoint Matching.")
@click.option("--batch", default=32, show_default=True, help="Paths per round.")
@click.option("--per-prompt", default=4, show_default=True, help="Consecutive paths of one prompt.")
@click.option("--micro-batch", help="Rows that a network sees at a time, or fit (measured); the result is the same.")
@click.option("--offload", is_flag=True, help="Keep paths in the host's memory.")
@click.option("--steps", default=40, show_default=True, help="Steps of the scheduler.")
@click.option("--rank", default=16, show_default=True, help="Of the adapter.")
@click.option("--all-weights", is_flag=True, help="Train all weights instead of an adapter, in a float32 copy.")
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--gradient-steps", default=1, show_default=True, help="Gradient steps per round.")
@click.option("--guidance", default=1.0, show_default=True, help="Classifier-free guidance scale.")
@click.option("--guidance-in", default=",".join(PLACES), show_default=True, help="Where guidance stands.")
@click.option("--dropout", default=0.0, show_default=True, help="Share of paths without a prompt.")
@click.option("--max-cost-gradient", type=float, help="Bound on the norm of λ∇r.")
@click.option("--samples", default=64, show_default=True, help="Samples to judge, before and after.")
@click.option("--monitor", default=0, show_default=True, help="Rounds between looks at the judges; stops when one falls.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Of the frozen weights; those of the adapter are float32.")  # fmt: skip
@common
def finetune_pipeline_command(
    pipeline: str, reward: str, judges: tuple[str, ...], prompts: Path, negative: str | None, strength: float, out: Path,
    resume: bool, overwrite: bool, rounds: int, batch: int, per_prompt: int, micro_batch: str | None, offload: bool,
    steps: int, rank: int, all_weights: bool, learning_rate: float, gradient_steps: int, guidance: float, guidance_in: str,
    dropout: float, max_cost_gradient: float | None, samples: int, monitor: int, dtype: str, seed: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Fine-tune a diffusers PIPELINE (a folder) towards a reward; OUT/adapter holds a LoRA for stock diffusers.

    With --all-weights, OUT/pipeline holds the whole pipeline.
    """
    from tiltflow.pipelines.job import PipelineConfig, help_pipeline, run_pipeline
    from tiltflow.pipelines.prompts import read_prompts

    try:
        from tiltflow.pipelines.chain import Guidance
        from tiltflow.pipelines.finetune import PipelineSettings
    except ImportError as error:
        raise TiltflowError('pipelines need diffusers and peft: pip install "tiltflow[diffusers,report]".') from error
    places = [place for place in guidance_in.split(",") if place]
    unknown = [place for place in places if place not in PLACES]
    if unknown:
        raise TiltflowError(f"--guidance-in {guidance_in}: {unknown[0]!r} is none of {', '.join(PLACES)}.")
    join()
    settings = PipelineSettings(
        rounds=rounds, batch=batch, per_prompt=per_prompt, steps=steps, learning_rate=learning_rate,
        rank=None if all_weights else rank, gradient_steps=gradient_steps, dropout=dropout, max_cost_gradient=max_cost_gradient,
        guidance=Guidance(guidance, *(place in places for place in PLACES)), micro_batch=_micro_batch(micro_batch),
        offload=offload,
    )  # fmt: skip
    if samples < 2 or monitor < 0 or (monitor and not judges):
        raise TiltflowError("--samples must be at least 2, and --monitor at least 0, with a --judge to look at.")
    config = PipelineConfig(
        pipeline, reward, read_prompts(prompts), strength, judges, negative, samples, monitor, seed, check_device(device),
        dtype, settings,
    )  # fmt: skip
    config.scores()  # misuse is found before the folder is touched
    pipe = config.load()
    if world().rank > 0:
        wait()  # until the first has claimed the folder
        help_pipeline(config, pipe, out, resume)
        return
    bars = Bars()
    with RunFolder(out, asdict(config), resume, overwrite) as folder:
        wait()
        result = run_pipeline(config, pipe, folder, command_line(), bars)
    bars.close()
    summary = result["rows"][0]
    names = [key.removesuffix("_base") for key in summary if key.endswith("_base")]
    rows = [{"": name, **{c: summary[f"{name}_{c}"] for c in ("base", "reached")}} for name in names]
    finish_run(result, out, rows, ["", "base", "reached"], as_json)


def _micro_batch(text: str | None) -> int | Literal["fit"] | None:
    """Nothing, fit, or a number."""
    if text is None:
        return None
    if text == "fit":
        return "fit"
    if not text.isdigit():
        raise TiltflowError(f"--micro-batch {text}: give a number, or fit.")
    return int(text)


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the merged pipeline; must not exist.")
@common
def export_command(run: Path, out: Path, seed: int, device: str, as_json: bool) -> None:
    """Merge the adapter of a finished finetune-pipeline RUN into its pipeline: a folder that stock diffusers loads."""
    from tiltflow.pipelines.job import ADAPTER, PIPELINE, load_pipeline

    config = run / "config.json"
    if (run / PIPELINE).is_dir():
        raise TiltflowError(f"all weights were trained: {run / PIPELINE} is the pipeline already.")
    if not config.is_file() or not (run / ADAPTER).is_dir():
        raise TiltflowError(f"{run} holds no finished run of finetune-pipeline.")
    if out.exists():
        raise TiltflowError(f"{out} exists; give another folder.")
    said = json.loads(config.read_text(encoding="utf-8"))
    pipe = load_pipeline(said["pipeline"], check_device(device), said["dtype"])
    from tiltflow.pipelines.adapters import load_adapter, merge_adapter

    load_adapter(pipe, run / ADAPTER)
    merge_adapter(pipe)
    pipe.save_pretrained(out, safe_serialization=True)
    finish(document(seed, device, [{"kind": "export", "out": str(out)}], None), as_json, f"merged pipeline: {out}")
