"""Files, written in one step and safe on the disk before they count; and saving without pickle.

A state, nested dicts and lists of tensors and JSON values, is one safetensors file: tensors go into it as themselves, and
the structure around them as a tensor of JSON text. Every safetensors file carries a checksum of its content in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.core.errors import TiltflowError

UNFINISHED = ".tiltflow-unfinished-"
"""How the name of a folder begins that a file is in while it is written; what a killed process leaves of one is rubbish."""
CHECKSUM, STATE = "sha256", "tiltflow_state"
"""Entries of headers: the checksum; the tensor that holds the structure of a state."""


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A path to write to: what it holds in the end takes the place of ``path``; a reader sees the old file or the new.

    Args:
        path: The file, in a folder that is there.
        keep: Where the old file goes, if there is one.

    Raises:
        TiltflowError: it cannot be written: no such folder, no room, no permission. The old file stays.
    """
    unfinished = None
    try:
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=path.parent))
        part = unfinished / path.name
        part.touch()
        mode = part.stat().st_mode
        yield part
        os.chmod(part, mode)  # safetensors writes files that only their owner may read
        _to_disk(part)
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(part, path)
        with suppress(OSError):  # some file systems cannot
            _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TiltflowError(f"{path} cannot be written: {why}.") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, as :func:`replacing` does."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """The same of a text."""
    write_bytes(path, text.encode("utf-8"))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, keep: Path | None = None
) -> None:
    """The same of tensors: a plain safetensors file, with a checksum in its header."""
    here, said = _on_host(tensors), dict(metadata or {})
    said[CHECKSUM] = _checksum(here, said)
    with replacing(path, keep) as part:
        save_file(here, part, said)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file.

    Raises:
        TiltflowError: no such file, no safetensors, or not what was written.
    """
    if not path.is_file():
        raise TiltflowError(f"no file {path}.")
    try:
        with safe_open(path, framework="pt") as f:
            said = dict(f.metadata() or {})
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise TiltflowError(f"{path} is damaged or not a safetensors file: {error}.") from error
    written = said.pop(CHECKSUM, None)
    if written is not None and written != _checksum(tensors, said):
        raise TiltflowError(f"{path} is damaged: its checksum is not that of what was written.")
    return tensors, said


def _checksum(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> str:
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _encode(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_encode(v, tensors) for v in value]}
    return value


def _on_host(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors as safetensors takes them, on the host with no memory shared; what is so already is not copied."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        here = value.detach().cpu().to(dtype or value.dtype).contiguous()
        here = here.clone() if here.untyped_storage().data_ptr() in taken else here
        taken.add(here.untyped_storage().data_ptr())
        found[name] = here
    return found


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_decode(v, tensors) for v in value["list"]]
    return {key: _decode(v, tensors) for key, v in value["pairs"]}


def save_state(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Write nested dicts and lists of tensors, numbers, strings, None. Dict keys may be strings or integers.

    ``keep``: where the file that it replaces goes.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors)).encode()
    tensors[STATE] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    write_tensors(path, tensors, keep=keep)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote. Raises TiltflowError if it is missing, damaged, or something else."""
    tensors, _ = read_tensors(path)
    structure = tensors.pop(STATE, None)
    if structure is None:
        raise TiltflowError(f"{path} is a safetensors file, but not a state that tiltflow wrote.")
    try:
        found = _decode(json.loads(structure.numpy().tobytes()), tensors)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise TiltflowError(f"{path} is damaged: its structure does not describe its tensors ({error}).") from error
    if not isinstance(found, dict):
        raise TiltflowError(f"{path} is damaged: it holds no state.")
    return found


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise TiltflowError, naming the file and the first one, for weights that are NaN or infinite."""
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise TiltflowError(f"{path}: {name} is not finite; the file is damaged.")


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Load a plain safetensors file of weights into ``module``. Raises TiltflowError naming what is wrong with it."""
    if not path.is_file():
        raise TiltflowError(f"no weights file {path}.")
    tensors, _ = read_tensors(path)
    require_finite(path, tensors)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise TiltflowError(f"{path} does not fit {type(module).__name__}: {error}.") from error


def save_weights(
    path: Path, module: torch.nn.Module, metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a module's weights as plain safetensors (cast to ``dtype``, if given), as :func:`replacing` does."""
    write_tensors(path, _on_host(module.state_dict(), dtype), metadata)
