"""Prompt files, and the drawing of conditions by the number of their line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

NAMED = 5
"""Bad lines that are named; the others are counted."""


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .txt file (one per line, blank lines left out), .jsonl (objects with "prompt") or .csv (column prompt).

    Raises:
        TiltflowError: no such file, another format, no prompt, or bad lines, with their numbers.
    """
    if not path.is_file():
        raise TiltflowError(f"no prompt file {path}.")
    readers = {".txt": _plain, ".jsonl": _json_lines, ".csv": _table}
    if path.suffix.lower() not in readers:
        raise TiltflowError(f"{path}: prompts are read from {', '.join(readers)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TiltflowError(f"{path} is not UTF-8 text: {error}.") from error
    prompts, bad = readers[path.suffix.lower()](text)
    if bad:
        named = "; ".join(f"line {number}: {why}" for number, why in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise TiltflowError(f"{path}: {named}{more}.")
    if not prompts:
        raise TiltflowError(f"{path} holds no prompt.")
    return prompts


Found = tuple[list[str], list[tuple[int, str]]]


def _plain(text: str) -> Found:
    return [line.strip() for line in text.splitlines() if line.strip()], []


def _json_lines(text: str) -> Found:
    prompts, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            bad.append((number, f"not JSON ({error})"))
            continue
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            prompts.append(value["prompt"])
        else:
            bad.append((number, 'no text under "prompt"'))
    return prompts, bad


def _table(text: str) -> Found:
    reader = csv.DictReader(io.StringIO(text))
    if "prompt" not in (reader.fieldnames or []):
        return [], [(1, f"no column prompt among {', '.join(reader.fieldnames or []) or 'none'}")]
    prompts, bad = [], []
    for row in reader:
        if row["prompt"]:
            prompts.append(row["prompt"])
        else:
            bad.append((reader.line_num, "no prompt"))
    return prompts, bad


@dataclass(frozen=True)
class DrawnConditions:
    """Draws numbers of conditions, ``(n, generator) -> {name: (n,)}``; −1 stands for the one that was dropped.

    Args:
        count: how many there are. per_prompt: consecutive rows that share one: a group, as group-relative rewards want.
        dropout: probability of −1, for every kind of condition (text, video, …) on its own; the number is the same in all.

    Raises:
        TiltflowError: counts below 1, probabilities outside of [0, 1].
    """

    count: int
    per_prompt: int = 1
    dropout: Mapping[str, float] = field(default_factory=lambda: {"prompt": 0.0})

    def __post_init__(self) -> None:
        if self.count < 1 or self.per_prompt < 1:
            raise TiltflowError(f"count and per_prompt must be at least 1, got {self.count} and {self.per_prompt}.")
        for name, p in self.dropout.items():
            if not 0 <= p <= 1:
                raise TiltflowError(f"the dropout of {name} must be between 0 and 1, got {p}.")

    def __call__(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Without repetition until all had their turn."""
        device = generator.device
        groups = -(-n // self.per_prompt)
        turns = [torch.randperm(self.count, generator=generator, device=device) for _ in range(-(-groups // self.count))]
        rows = torch.cat(turns)[:groups].repeat_interleave(self.per_prompt)[:n]
        return {
            name: torch.where(torch.rand(n, generator=generator, device=device) < p, -1, rows)
            for name, p in self.dropout.items()
        }
