"""A run that fine-tunes: config, checkpoint, adapter or pipeline with its card, samples, metrics, verdict, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow._version import __version__
from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.finetune import (
    PipelineSettings,
    TunedPipeline,
    finetune_pipeline,
    judge_pipeline,
)
from tiltflow.report import Page, gallery, scores_table, training_blocks, write_page
from tiltflow.report.figures import TILTING
from tiltflow.report.samples import SAME_NOISE
from tiltflow.report.sounds import DECIBELS, spectrograms, wav
from tiltflow.rewards.combine import Score
from tiltflow.run.folder import RunFolder, document
from tiltflow.run.names import import_function
from tiltflow.train.distributed import world
from tiltflow.train.store import write_bytes, write_text
from tiltflow.verdict.line import REWARD, SIGMAS, Line, Verdict, overall
from tiltflow.verdict.paired import Judged, against_base

Progress = Callable[[str, int, int], None]
ADAPTER, PIPELINE, CARD = "adapter", "pipeline", "README.md"
"""Folders of what was trained, low-rank or all weights, and the card in them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRID = 32
HEARD = 4
"""Samples of audio that are written as files."""
EVALUATION = 1_000
"""Added to the seed for the samples that are judged."""


@dataclass(frozen=True)
class PipelineConfig:
    """What a run is told.

    Args:
        pipeline: folder (or hub name) of a diffusers pipeline. prompts: the texts. strength: λ.
        reward, judges: ``module:function`` of scores (what the pipeline makes, texts) → (n,); judges are held out.
        samples: drawn before and after, with the same noise. monitor: rounds between looks at the judges (0: none).
    """

    pipeline: str
    reward: str
    prompts: list[str]
    strength: float
    judges: tuple[str, ...] = ()
    negative: str | None = None
    samples: int = 64
    monitor: int = 0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    settings: PipelineSettings = field(default_factory=PipelineSettings)

    def load(self) -> Any:
        """The pipeline on its device. Raises TiltflowError if it cannot be read; weights are safetensors only."""
        return load_pipeline(self.pipeline, self.device, self.dtype)

    def scores(self) -> dict[str, Score]:
        """The reward and the judges, by name."""
        return {REWARD: import_function(self.reward)} | {name: import_function(name) for name in self.judges}


def load_pipeline(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """A diffusers pipeline of a folder or hub name.

    Raises:
        TiltflowError: diffusers or peft is not installed, or there is no pipeline with safetensors weights.
    """
    try:
        import peft  # noqa: F401
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise TiltflowError('pipelines need diffusers and peft: pip install "tiltflow[diffusers,report]".') from error
    try:
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=DTYPES[dtype], use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TiltflowError(f"{name} holds no diffusers pipeline that can be read: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def run_pipeline(
    config: PipelineConfig,
    pipe: Any,
    folder: RunFolder,
    command: str,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run the job on the loaded pipeline inside an opened run folder; returns the document that metrics.json holds.

    With ``monitor``, judges are asked during training about a quarter of the samples; it ends when one of them is lower than
    the base's by more than three standard errors of the paired difference: the reward is being hacked.

    Raises:
        TiltflowError: as :func:`~tiltflow.pipelines.finetune.finetune_pipeline`.
    """
    started = time.perf_counter()
    scores = config.scores()
    generator = torch.Generator(config.device).manual_seed(config.seed)
    tuned, watch = _train(config, folder.checkpoint, folder.resume, pipe, scores, generator, progress)
    trained = time.perf_counter() - started
    made = folder.path / (PIPELINE if config.settings.rank is None else ADAPTER)
    tuned.save(made)
    before, after = (_judge(tuned, scores, config.samples, config.seed, base) for base in (True, False))
    progress("samples", 1, 1)
    lines = against_base(before, after)
    if watch.stopped:
        lines.append(watch.line())
    row: dict[str, Any] = {"kind": "summary", "pipeline": config.pipeline, "strength": config.strength}
    for name in scores:
        row |= {f"{name}_base": float(before.scores[name].mean()), f"{name}_reached": float(after.scores[name].mean())}
    row |= {
        "kl": float(after.kl.mean()),
        "diversity_base": before.diversity,
        "diversity_reached": after.diversity,
        "rounds": len(tuned.history),
        "train_seconds": trained,
        "seconds": time.perf_counter() - started,
    }
    history = [{k: v for k, v in h.items() if not isinstance(v, list)} for h in tuned.history]
    said = ({"kind": "verdict", **line._asdict()} for line in lines)
    rows = [row, *said, *({"kind": "iteration", **h} for h in history)]
    result = document(command, config.seed, config.device, rows, overall(lines))
    save_file({"before": before.x.cpu(), "after": after.x.cpu()}, folder.path / "samples.safetensors")
    write_text(made / CARD, card(config, result))
    folder.write_json("metrics.json", result)
    _report(config, folder, tuned, result, lines, before, after)
    return result


def help_pipeline(config: PipelineConfig, pipe: Any, out: Path, resume: bool) -> None:
    """What every process but the first does of a run: train, with a checkpoint of its own in the run folder."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    scores, checkpoint = config.scores(), out / f"checkpoint-{world().rank}.safetensors"
    _train(config, checkpoint, resume, pipe, scores, generator)


class Watch:
    """The judges during training: asks every ``monitor`` rounds, and says when to stop."""

    def __init__(self, config: PipelineConfig, judges: Mapping[str, Score]) -> None:
        self.every, self.seed, self.judges = config.monitor, config.seed, judges
        self.n = max(config.samples // 4, 8)
        self.base: Judged | None = None
        self.stopped: dict[str, float] = {}

    def __call__(self, tuned: TunedPipeline, row: dict[str, Any]) -> bool:
        """Put judge and diversity into the round's row; True to stop."""
        if not self.every or (row["iteration"] + 1) % self.every:
            return False
        if self.base is None:
            self.base = _judge(tuned, self.judges, self.n, self.seed + 1, base=True)
        now = _judge(tuned, self.judges, self.n, self.seed + 1)
        row["diversity"] = now.diversity
        for name, value in now.scores.items():
            change = value - self.base.scores[name]
            row["judge"] = row[f"judge {name}"] = float(value.mean())
            if float(change.mean()) < -SIGMAS * float(change.std()) / len(change) ** 0.5:
                self.stopped = {name: float(change.mean()), "round": row["iteration"] + 1}
        return bool(self.stopped)

    def line(self) -> Line:
        """That it was stopped, and by whom."""
        name, change = next(iter(self.stopped.items()))
        said = f"stopped after round {self.stopped['round']}: {name} had fallen while the reward rose"
        return Line("reward hacking", change, None, None, "judges do not fall", "fail", said)


def _train(
    config: PipelineConfig,
    checkpoint: Path,
    resume: bool,
    pipe: Any,
    scores: Mapping[str, Score],
    generator: torch.Generator,
    progress: Progress = lambda what, done, total: None,
) -> tuple[TunedPipeline, Watch]:
    watch = Watch(config, {name: score for name, score in scores.items() if name != REWARD})

    def advance(row: dict[str, Any], tuned: TunedPipeline) -> bool:
        progress("fine-tuning", row["iteration"] + 1, config.settings.rounds)
        return watch(tuned, row)

    tuned = finetune_pipeline(
        pipe, scores[REWARD], config.prompts, config.strength, config.settings, generator=generator,
        negative=config.negative, checkpoint=checkpoint, resume=resume, callback=advance,
    )  # fmt: skip
    return tuned, watch


def _judge(tuned: TunedPipeline, scores: Mapping[str, Score], n: int, seed: int, base: bool = False) -> Judged:
    generator = torch.Generator(str(tuned.pipe.device)).manual_seed(EVALUATION + seed)
    return judge_pipeline(tuned, scores, n, generator, base)


def card(config: PipelineConfig, result: Mapping[str, Any]) -> str:
    """The model card of the adapter, or of the pipeline with all its weights trained; Markdown."""
    summary = result["rows"][0]
    from diffusers import __version__ as diffusers
    from peft import __version__ as peft

    numbers = "\n".join(f"| {k} | {v} |" for k, v in summary.items() if k != "kind")
    settings = "\n".join(f"| {k} | {v} |" for k, v in asdict(config.settings).items())
    kind = "All weights of" if config.settings.rank is None else "Adapter for"
    made_by = f"tiltflow {result['version']} (torch {torch.__version__}, diffusers {diffusers}, peft {peft})"
    return (
        f"# {kind} {config.pipeline}\n\nTilted towards `{config.reward}` with λ = {config.strength:g}, seed "
        f"{config.seed}, {len(config.prompts)} prompts, by {made_by}.\n\n"
        f"Verdict: **{result['verdict']}**.\n\n    {result['command']}\n\n"
        f"| | |\n|---|---|\n{numbers}\n\n| setting | |\n|---|---|\n{settings}\n\n"
        "The licence is that of the base model; check that it allows derived weights.\n"
    )


def _report(
    config: PipelineConfig, folder: RunFolder, tuned: TunedPipeline, result: Mapping[str, Any], lines: list[Line],
    before: Judged, after: Judged,
) -> None:  # fmt: skip
    row = result["rows"][0]
    with torch.no_grad():
        pictures = [tuned.chain.family.decode(tuned.pipe, found.x[:GRID]).cpu() for found in (before, after)]
    sounds: list[list[bytes]] = [[], []]
    if pictures[0].ndim == 3:
        sounds = [_sounds(folder.path, *made, tuned.pipe) for made in zip(("before", "after"), pictures, strict=True)]
        pictures = [spectrograms(made) for made in pictures]
    scores = [(name, row[f"{name}_base"], None, row[f"{name}_reached"]) for name in after.scores]
    levels = {"reward": {"before": row[f"{REWARD}_base"]}}
    scores += [("diversity", before.diversity, None, after.diversity), ("KL to the base", 0.0, None, row["kl"])]
    notes = ["Samples before and after have the same noise and prompts, row by row."]
    if sounds[0]:
        notes.append(f"Audio is shown as spectrograms, low frequencies below, {DECIBELS} decibels deep.")
    sets = {"Before": pictures[0], "After": pictures[1]}
    heard = {"Before": sounds[0], "After": sounds[1]}
    shown = gallery(sets, value_range=(0.0, 1.0), sounds=heard, caption=SAME_NOISE)
    page = Page(
        title=f"{Path(config.pipeline).name} tilted towards {config.reward}, λ = {config.strength:g}",
        command=result["command"],
        verdict=Verdict(result["verdict"], lines),
        blocks=[shown, scores_table(scores)],
        training=training_blocks(tuned.history, TILTING, levels, tuned.chain.t.tolist()),
        history=tuned.history,
        config={k: v for k, v in asdict(config).items() if k != "settings"} | asdict(config.settings),
        notes=notes,
        version=__version__,
    )
    write_page(folder.path, page)


def _sounds(folder: Path, name: str, made: Tensor, pipe: Any) -> list[bytes]:
    """The first of what the pipeline made, as WAV files, here and in the folder."""
    part = pipe.vocoder if hasattr(pipe, "vocoder") else pipe.vae
    files = [wav(sound, int(part.config.sampling_rate)) for sound in made[:HEARD]]
    for i, file in enumerate(files):
        write_bytes(folder / f"{name}-{i}.wav", file)
    return files
