"""Encoded prompts: joined in memory, or on disk, where a later run finds them.

On disk a set of prompts is one safetensors file, read by mapping it: rows that are not asked for take no memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Rows = dict[str, Tensor]
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the types of encodings."""
SEEN = 64
"""Entries of every weight that a fingerprint looks at."""


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows (n + 1, …) of parts that each end with the negative row, which is taken once; zeros lengthen short ones."""
    shapes = _shapes(parts)
    whole = {name: [_padded(p[name][:-1], shapes[name]) for p in parts] for name in parts[0]}
    return {name: torch.cat([*v, _padded(parts[0][name][-1:], shapes[name])]) for name, v in whole.items()}


def on_disk(folder: Path, key: str, parts: Iterator[Rows]) -> Rows:
    """The same, mapped from ``folder``; parts are asked for only if they are not there yet, and held one at a time."""
    file = folder / f"{key}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            names = []
            for i, part in enumerate(parts):
                names.append(Path(place) / f"{i}.safetensors")
                save_file({name: v.contiguous() for name, v in part.items()}, names[-1])
            whole = Path(place) / "whole"
            _write(whole, names)
            os.replace(whole, file)
    return load_file(file)


def _write(file: Path, names: Sequence[Path]) -> None:
    """Join files into one, a part in memory at a time."""
    some = [load_file(name) for name in names]  # mapped, not read
    shapes, counts = _shapes(some), [len(next(iter(part.values()))) - 1 for part in some]
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = some[0][name].dtype
        size = kind.itemsize * (sum(counts) + 1) * int(torch.Size(shape).numel())
        header[name] = {"dtype": NAMES[kind], "shape": [sum(counts) + 1, *shape], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for part in [*(p[name][:-1] for p in some), some[0][name][-1:]]:
                f.write(_padded(part, shape).contiguous().view(torch.uint8).numpy().tobytes())


def _shapes(parts: Sequence[Rows]) -> dict[str, tuple[int, ...]]:
    """The largest shape of a row, by name."""
    return {
        name: tuple(max(sizes) for sizes in zip(*(p[name].shape[1:] for p in parts), strict=True)) for name in parts[0]
    }


def _padded(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    wide = rows.new_zeros(len(rows), *shape)
    wide[tuple(slice(size) for size in rows.shape)] = rows
    return rows if rows.shape == wide.shape else wide


def fingerprint(pipe: Any, *said: Any) -> str:
    """A name for what a pipeline makes of prompts: the configurations and some weights of its parts, and what is said."""
    found = hashlib.sha256(json.dumps([type(pipe).__name__, said], sort_keys=True, default=str).encode())
    for name, part in sorted(pipe.components.items()):
        found.update(name.encode() + type(part).__name__.encode())
        if isinstance(part, nn.Module):
            found.update(str(getattr(part, "config", "")).encode())
            for key, value in part.state_dict().items():
                few = value.detach().flatten()[:SEEN].float().cpu()
                found.update(f"{key}{tuple(value.shape)}{value.dtype}{few.tolist()}".encode())
    return found.hexdigest()[:32]
