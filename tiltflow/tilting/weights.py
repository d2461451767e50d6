"""The files of a tilted model: the chain, and the network in a form that cannot be mistaken for another.

A network that predicts velocity, noise or score is saved under its own names: the file loads into the user's own class and
is right there. A network that predicts x1 is fine-tuned inside a :class:`~tiltflow.core.control.Blend` with the frozen base,
and is wrong without it: its names are prefixed, so that no class takes them by mistake, and the header says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from tiltflow.core.chain import InterpolantChain
from tiltflow.core.control import Blend
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.train.store import load_state, read_tensors, require_finite, save_state, write_tensors

WEIGHTS, CHAIN = "weights.safetensors", "chain.safetensors"
BLENDED = "blended."
"""Prefix of the weights of a network that is right only inside its Blend."""
SAID = "X̂_1 = base + β_t (network − base): load with tiltflow.load, not into a network alone"


def save_network(folder: Path, process: Process) -> None:
    """Write weights.safetensors."""
    model = process.model
    assert isinstance(model, nn.Module)
    blended = isinstance(model, Blend)
    state = (model.net if isinstance(model, Blend) else model).state_dict()
    tensors = {f"{BLENDED if blended else ''}{k}": v for k, v in state.items()}
    header = {"kind": "blend" if blended else "network", "predicts": process.predicts}
    if blended:
        header["formula"] = SAID
    write_tensors(folder / WEIGHTS, tensors, {"tiltflow": json.dumps(header)})


def load_network(folder: Path, process: Process) -> None:
    """Read weights.safetensors into the model of a process that starts at the base.

    Raises:
        TiltflowError: no such file, one that is damaged, or weights that do not fit, naming which.
    """
    path, model = folder / WEIGHTS, process.model
    if not path.is_file():
        raise TiltflowError(f"{folder} has no {WEIGHTS}: the run is not finished (--resume continues it).")
    net = model.net if isinstance(model, Blend) else model
    assert isinstance(net, nn.Module)
    prefix = BLENDED if isinstance(model, Blend) else ""
    found, _ = read_tensors(path)
    require_finite(path, found)
    if any(not name.startswith(prefix) for name in found):
        raise TiltflowError(f"{path} does not hold the weights of an x1 network in its blend.")
    try:
        net.load_state_dict({name.removeprefix(prefix): v for name, v in found.items()})
    except RuntimeError as error:
        raise TiltflowError(f"{path} does not fit {type(net).__name__}: {error}.") from error


def save_chain(folder: Path, chain: InterpolantChain) -> None:
    """Write chain.safetensors: times and coefficients."""
    parts = {name: getattr(chain, name) for name in ("t", "a", "b", "std", "memoryless")}
    save_state(folder / CHAIN, parts)


def load_chain(folder: Path, base: Process) -> InterpolantChain:
    """The chain of a base that :func:`save_chain` wrote. Raises TiltflowError if it is missing, damaged or none."""
    try:
        return InterpolantChain(base, **load_state(folder / CHAIN))
    except TypeError as error:
        raise TiltflowError(f"{folder / CHAIN} holds no chain: {error}.") from error
