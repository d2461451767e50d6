"""Saving without pickle: nested dicts and lists of tensors and JSON values in one safetensors file, written atomically.

Tensors go into the file as themselves; the structure around them is JSON in the file's header.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.core.errors import TiltflowError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a reader sees the old file or the new, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """The same of a text."""
    write_bytes(path, text.encode("utf-8"))


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _encode(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_encode(v, tensors) for v in value]}
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_decode(v, tensors) for v in value["list"]]
    return {key: _decode(v, tensors) for key, v in value["pairs"]}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, strings, None. Dict keys may be strings or integers."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_encode(state, tensors))
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"tiltflow_state": header})
    os.replace(part, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote. Raises TiltflowError if it is missing, damaged, or something else."""
    if not path.is_file():
        raise TiltflowError(f"no file {path}.")
    try:
        with safe_open(path, framework="pt") as f:
            header = (f.metadata() or {}).get("tiltflow_state")
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise TiltflowError(f"{path} is damaged or not a safetensors file: {error}.") from error
    if header is None:
        raise TiltflowError(f"{path} is a safetensors file, but not a state that tiltflow wrote.")
    try:
        return _decode(json.loads(header), tensors)
    except (ValueError, LookupError, TypeError) as error:
        raise TiltflowError(f"{path} is damaged: its header does not describe its tensors ({error}).") from error


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Load a plain safetensors file of weights into ``module``. Raises TiltflowError naming what does not fit."""
    if not path.is_file():
        raise TiltflowError(f"no weights file {path}.")
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
        module.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise TiltflowError(f"{path} does not fit {type(module).__name__}: {error}.") from error


def save_weights(
    path: Path, module: torch.nn.Module, metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a module's weights as plain safetensors (cast to ``dtype``, if given), atomically."""
    part = path.with_name(path.name + ".part")
    save_file({name: v.detach().to("cpu", dtype or v.dtype).contiguous().clone() for name, v in module.state_dict().items()},
              part, metadata)  # fmt: skip
    os.replace(part, path)
