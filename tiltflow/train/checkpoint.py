"""The checkpoint of a training: weights, average, running statistics, optimiser, generator, buffer, auxiliaries, history.

That of several processes is written by the first, and is what one process would have written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.train.buffer import Buffer
from tiltflow.train.distributed import brought, own, world
from tiltflow.train.method import Method, State
from tiltflow.train.store import load_state, save_state


@dataclass
class Progress:
    """All that changes while :func:`tiltflow.train.fit.fit` runs."""

    method: Method
    state: State
    weights: list[nn.Parameter]
    average: list[Tensor]
    optimiser: torch.optim.Optimizer
    buffer: Buffer
    history: list[dict[str, Any]]


@runtime_checkable
class Counts(Protocol):
    """An auxiliary that counts what it did."""

    def pool(self) -> None:
        """Move the counts of all processes to the first."""
        ...


def pool_counts(now: Progress) -> None:
    """What was counted is in the first process."""
    for item in now.method.auxiliary.values():
        if isinstance(item, Counts):
            item.pool()


def save_checkpoint(path: Path, now: Progress) -> None:
    """Write ``path``, in one step."""
    pool_counts(now)
    buffer = {name: brought(v) for name, v in now.buffer.state_dict().items()}
    if world().rank > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "iteration": now.state.iteration,
        "weights": [p.detach() for p in now.weights],
        "running": list(now.state.control.module.buffers()),
        "average": now.average,
        "optimiser": now.optimiser.state_dict(),
        "generator": now.state.generator.get_state(),
        "buffer": buffer,
        "auxiliary": {name: item.state_dict() for name, item in now.method.auxiliary.items()},
        "history": now.history,
    }
    save_state(path, saved)


def load_checkpoint(path: Path | None, now: Progress) -> None:
    """Put ``now`` where the checkpoint was. Raises TiltflowError if there is none, or it is that of another network."""
    if path is None or not path.is_file():
        raise TiltflowError(f"nothing to resume: no checkpoint at {path}.")
    saved = load_state(path)
    if [p.shape for p in now.weights] != [w.shape for w in saved["weights"]]:
        raise TiltflowError(f"{path} holds the weights of another network; resume with the one that was trained.")
    running = list(now.state.control.module.buffers())
    for p, w in zip([*now.weights, *running], [*saved["weights"], *saved["running"]], strict=True):
        p.data.copy_(w)
    for a, w in zip(now.average, saved["average"], strict=True):
        a.copy_(w)
    now.optimiser.load_state_dict(saved["optimiser"])
    now.state.generator.set_state(saved["generator"])
    now.state.iteration = saved["iteration"]
    now.buffer.load_state_dict({name: own(v) for name, v in saved["buffer"].items()})
    for name, item in now.method.auxiliary.items():
        item.load_state_dict(saved["auxiliary"][name])
    now.history[:] = saved["history"]
