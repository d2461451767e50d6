"""Shipped weights: safetensors files that say in their own header what they are (see MODEL_CARDS.md).

The header's entry "tiltflow" is a JSON object with "kind" (a key of `KINDS`) and "kwargs" (the constructor's
arguments); a base also carries "predicts", "interpolant" and "event_shape". Storage may be half precision;
loading gives float32.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process
from tiltflow.digits.nets import DigitNet, JudgeClassifier, RewardClassifier
from tiltflow.train.store import save_weights

__all__ = [
    "INTERPOLANTS",
    "KINDS",
    "load_base",
    "load_digits_base",
    "load_network",
    "save_network",
    "shipped",
]

KINDS: dict[str, type[nn.Module]] = {c.__name__: c for c in (DigitNet, RewardClassifier, JudgeClassifier)}
INTERPOLANTS = {"linear": Linear}


def shipped(name: str) -> Path:
    """Path of the shipped `<name>.safetensors`: "digits-base", "digits-classifier" or "digits-judge"."""
    path = Path(str(files("tiltflow.digits") / "assets" / f"{name}.safetensors"))
    if not path.is_file():
        raise TiltflowError(
            f"no shipped weights are called {name!r} ({path.name} is missing from the installed package)"
        )
    return path


def save_network(
    path: Path,
    network: nn.Module,
    kwargs: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> None:
    """Write weights and header atomically: the file is complete or the old one is untouched."""
    header = json.dumps({"kind": type(network).__name__, "kwargs": kwargs, **metadata})
    save_weights(path, network, {"tiltflow": header}, dtype)


def load_network(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The network, frozen and in evaluation mode, and its header.

    Raises:
        TiltflowError: the file is missing, is no safetensors file, or was not written by `save_network`.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            header = json.loads((handle.metadata() or {}).get("tiltflow", "{}"))
        tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
    except (FileNotFoundError, SafetensorError) as error:
        raise TiltflowError(f"cannot read weights from {path}: {error}") from error
    if header.get("kind") not in KINDS:
        raise TiltflowError(f"{path} does not say which network it holds; known kinds: {', '.join(KINDS)}")
    network = KINDS[header["kind"]](**header["kwargs"]).to(dtype)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise TiltflowError(f"the weights in {path} do not fit a {header['kind']}: {error}") from error
    return network.eval().requires_grad_(False), header


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> Process:
    """The base process stored at `path` by `tiltflow pretrain`."""
    network, header = load_network(path, dtype)
    missing = {"interpolant", "predicts", "event_shape"} - header.keys()
    if missing:
        raise TiltflowError(
            f"{path} holds a {header['kind']}, not a base process: its header lacks {sorted(missing)}"
        )
    return Process(
        INTERPOLANTS[header["interpolant"]](), network, header["predicts"], tuple(header["event_shape"])
    )


def load_digits_base(dtype: torch.dtype = torch.float32) -> Process:
    """The shipped class-conditional digits flow (condition: label (B,) in 0..9, or -1 / None for any)."""
    return load_base(shipped("digits-base"), dtype)
