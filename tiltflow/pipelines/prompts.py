"""Prompt files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from tiltflow.core.errors import TiltflowError

LARGEST = 2**28
"""Bytes of a prompt file."""
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
        if path.stat().st_size > LARGEST:
            raise TiltflowError(f"{path} has more than {LARGEST} bytes, too many for prompts.")
        text = path.read_bytes().decode("utf-8-sig")  # as it is: a line ends at \n and nowhere else
    except UnicodeDecodeError as error:
        raise TiltflowError(f"{path} is not UTF-8 text: {error}.") from error
    prompts, bad = readers[path.suffix.lower()](text)
    if bad:
        named = "; ".join(f"line {number}: {why}" for number, why in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise TiltflowError(f"{path}: {named}{more}.")
    if not prompts:
        raise TiltflowError(f"{path} holds no prompt.")
    broken = [i for i, prompt in enumerate(prompts, 1) if not _encodable(prompt)]
    if broken:
        raise TiltflowError(f"{path}: prompt {broken[0]} holds half of a surrogate pair, which is no text.")
    return prompts


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


Found = tuple[list[str], list[tuple[int, str]]]


def _plain(text: str) -> Found:
    return [line.strip() for line in text.split("\n") if line.strip()], []


def _json_lines(text: str) -> Found:
    prompts, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.append((number, f"not JSON ({error})"))
            continue
        if isinstance(value, dict) and isinstance(value.get("prompt"), str) and value["prompt"].strip():
            prompts.append(value["prompt"])
        else:
            bad.append((number, 'no text under "prompt"'))
    return prompts, bad


def _table(text: str) -> Found:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    prompts: list[str] = []
    bad: list[tuple[int, str]] = []
    try:
        if "prompt" not in (reader.fieldnames or []):
            return [], [(1, f"no column prompt among {', '.join(reader.fieldnames or []) or 'none'}")]
        for row in reader:
            if (row["prompt"] or "").strip():
                prompts.append(row["prompt"])
            else:
                bad.append((reader.line_num, "no prompt"))
    except csv.Error as error:
        bad.append((reader.reader.line_num, str(error)))
    return prompts, bad
