"""Prompts encoded: where, how many at a time, and where the rows are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.embeddings import Rows, fingerprint, joined, on_disk
from tiltflow.pipelines.families import DECODERS, Family, device_of, family_of
from tiltflow.pipelines.networks import names_of

HOST = torch.device("cpu")
AT_ONCE = 8
"""Prompts that are encoded at a time."""
FIXED = ("hf_quantizer", "_hf_hook")
"""Marks of components that are quantised or place themselves, which are not moved."""


@torch.no_grad()
def encode_prompts(
    pipe: Any,
    texts: list[str],
    negative: str | None = None,
    folder: Path | str | None = None,
    family: Family | None = None,
) -> Rows:
    """Rows (n + 1, …) of texts, on the host; the last is of ``negative`` (None: what the pipeline takes for it).

    Args:
        pipe: Of a supported family.
        texts: The prompts.
        negative: The negative prompt.
        folder: Where they are kept, and found again; rows are then read from the disk when they are needed.
        family: Of the pipeline, with arguments of its call; None: without any.

    Raises:
        TiltflowError: no text.
    """
    if not texts:
        raise TiltflowError("there is no prompt; give at least one, which may be empty.")
    family, device = family or family_of(pipe), device_of(pipe)
    said = [type(family).__name__, getattr(family, "call", {})]

    def parts() -> Iterator[Rows]:
        with encoders_on(pipe, device):
            for i in range(0, len(texts), AT_ONCE):
                some = texts[i : i + AT_ONCE]
                other = {} if negative is None else {"negative_prompt": [negative] * len(some)}
                yield on_host(family.encode(pipe, {"prompt": some} | other))

    if folder is None:
        return joined([*parts()])
    return on_disk(Path(folder), fingerprint(pipe, texts, negative, said), parts())


def on_host(rows: Rows) -> Rows:
    """The rows in the host's memory."""
    return {name: v.cpu() for name, v in rows.items()}


@contextmanager
def encoders_on(pipe: Any, device: torch.device) -> Iterator[None]:
    """While this lasts, what only prompts need, all but network and decoder, is on ``device``; then where it was."""
    needed = (*names_of(pipe, family_of(pipe).network), *DECODERS)
    parts: list[Any] = [part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in needed]
    moved = [(part, part.device) for part in parts if not any(hasattr(part, mark) for mark in FIXED)]
    try:
        for part, _ in moved:
            part.to(device)
        yield
    finally:
        for part, before in moved:
            part.to(before)
