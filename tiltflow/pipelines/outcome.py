"""What a tilted pipeline came to, as numbers and as the blocks of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.methods.registry import Row
from tiltflow.pipelines.chain import PipelineChain
from tiltflow.report import gallery, scores_table, training_blocks
from tiltflow.report.figures import TILTING
from tiltflow.report.page import Block
from tiltflow.report.samples import SAME_NOISE
from tiltflow.report.sounds import DECIBELS, spectrograms, wav
from tiltflow.run.job import Outcome
from tiltflow.train.store import write_bytes
from tiltflow.verdict.line import Score, Verdict
from tiltflow.verdict.paired import Judged

GRID, HEARD, FRAMES = 32, 4, 4
"""Samples that are shown; those of audio that are written as files; frames of a video that are shown."""


class Tilted(Protocol):
    """What is needed of a :class:`~tiltflow.pipelines.model.TiltedPipeline`."""

    @property
    def pipe(self) -> Any: ...

    @property
    def chain(self) -> PipelineChain: ...

    @property
    def row(self) -> Row: ...

    @property
    def history(self) -> list[dict[str, Any]]: ...

    def decode(self, x: Tensor) -> Tensor: ...


def outcome(
    model: Tilted, title: str, summary: dict[str, Any], verdict: Verdict, before: Judged, after: Judged, folder: Path
) -> Outcome:
    """The outcome of a verdict on samples of base and tilted pipeline; sounds go into the folder when it is drawn."""
    latents = {"before": before.x, "after": after.x}
    return Outcome(
        title=title,
        summary=summary,
        verdict=verdict,
        tensors=latents,
        history=model.history,
        notes=notes_on(model),
        draw=lambda: blocks(model, verdict, summary["kl"], latents, folder),
    )


def notes_on(model: Tilted) -> list[str]:
    """What a reader of the page should know."""
    notes = ["Samples before and after have the same prompts" + (" and noise, row by row." if model.row.trained else ".")]
    if model.row.bias:
        notes.append(f"The method {model.row.name!r} does not reach p_base·exp(λr): it {model.row.bias}.")
    if sounds_of(model.pipe) is not None:
        notes.append(f"Audio is shown as spectrograms, low frequencies below, {DECIBELS} decibels deep.")
    return notes


def blocks(
    model: Tilted, verdict: Verdict, kl: float | None, latents: dict[str, Tensor], folder: Path
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    rows = model.chain.micro_batch or GRID
    made = {name: torch.cat([model.decode(part).cpu() for part in x[:GRID].split(rows)]) for name, x in latents.items()}
    sounds: dict[str, list[bytes]] = {}
    if made["after"].ndim == 3:
        sounds = {name.capitalize(): write_sounds(folder, name, x, model.pipe) for name, x in made.items()}
        made = {name: spectrograms(x) for name, x in made.items()}
    if made["after"].ndim == 5:
        made = {name: strips(x) for name, x in made.items()}
    shown = gallery(
        {name.capitalize(): x for name, x in made.items()},
        value_range=(0.0, 1.0),
        sounds=sounds,
        caption=SAME_NOISE if model.row.trained else "",
    )
    table = [*verdict.scores, Score("KL to the base", 0.0, None, kl)]
    levels = {"reward": {"before": verdict.scores[0].base}}
    return [shown, scores_table(table)], training_blocks(model.history, TILTING, levels, model.chain.t.tolist())


def strips(x: Tensor) -> Tensor:
    """Some frames of videos (B, frames, 3, H, W) side by side, (B, 3, H, frames W)."""
    some = torch.linspace(0, x.shape[1] - 1, min(FRAMES, x.shape[1])).long()
    return x[:, some].permute(0, 2, 3, 1, 4).flatten(3)


def sounds_of(pipe: Any) -> Any:
    """The part that makes sounds, None if there is none."""
    parts = (getattr(pipe, name, None) for name in ("vocoder", "vae"))
    return next((part for part in parts if hasattr(getattr(part, "config", None), "sampling_rate")), None)


def write_sounds(folder: Path, name: str, made: Tensor, pipe: Any) -> list[bytes]:
    """The first of what the pipeline made, as WAV files, here and in the folder."""
    files = [wav(sound, int(sounds_of(pipe).config.sampling_rate)) for sound in made[:HEARD]]
    for i, file in enumerate(files):
        write_bytes(folder / f"{name}-{i}.wav", file)
    return files
