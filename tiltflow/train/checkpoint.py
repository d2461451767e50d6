"""The checkpoint of a training: weights, average, running statistics, optimiser, generators, buffer, auxiliaries, history.

That of several processes is written by the first, and is what one process would have written.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError, TiltflowWarning
from tiltflow.train.buffer import Buffer
from tiltflow.train.distributed import brought, fingerprint, own, world
from tiltflow.train.method import Method, State
from tiltflow.train.store import load_state, save_state

START = "the weights that training starts from"
"""What :func:`tiltflow.train.fit.fit` adds to the identity of a run."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is kept: its last state in ``path``, and the one before in ``older``.

    Args:
        path: The file.
        identity: Whose it is: what the training depends on, each as a hash; a state of another training is not resumed.
            Without it, any state of a network of this shape is.
        fixed: The parts of the identity that must be the same; None: all.
    """

    path: Path
    identity: Mapping[str, str] = field(default_factory=dict)
    fixed: frozenset[str] | None = None

    @property
    def older(self) -> Path:
        """The state before the last."""
        return self.path.with_name(f"{self.path.stem}.older{self.path.suffix}")

    def exists(self) -> bool:
        """Whether there is one of the two."""
        return self.path.is_file() or self.older.is_file()

    def remove(self) -> None:
        """Both are needed no more."""
        for path in (self.path, self.older):
            path.unlink(missing_ok=True)

    def starting_from(self, weights: list[Tensor]) -> Checkpoint:
        """With the hash of these weights in the identity, if there is one."""
        return replace(self, identity={**self.identity, START: str(fingerprint(*weights))}) if self.identity else self

    def save(self, state: dict[str, Any]) -> None:
        """Write the file, in one step; the one that was there is the older now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_state(self.path, {"identity": dict(self.identity), **state}, keep=self.older)

    def load(self) -> dict[str, Any]:
        """The last state, or if it is damaged the one before, with a warning.

        Raises:
            TiltflowError: there is none, none that can be read, or it is that of another training.
        """
        faults = []
        for path in (self.path, self.older):
            if not path.is_file():
                continue
            try:
                found = load_state(path)
            except TiltflowError as error:
                faults.append(str(error))
                continue
            self._require_own(path, found.get("identity"))
            if faults:
                warnings.warn(f"{faults[0]} The checkpoint before it is taken.", TiltflowWarning, stacklevel=2)
            return found
        if faults:
            raise TiltflowError(f"{' '.join(faults)} There is no other checkpoint: start again.")
        raise TiltflowError(f"nothing to resume: no checkpoint at {self.path}.")

    def _require_own(self, path: Path, found: Any) -> None:
        """Raise TiltflowError if a state is that of another training."""
        saved = found if isinstance(found, dict) else {}
        wanted = self.identity if self.fixed is None else {k: v for k, v in self.identity.items() if k in self.fixed}
        others = [name for name, value in wanted.items() if saved.get(name) != value]
        if others:
            raise TiltflowError(
                f"{path} was written with other values of: {', '.join(others)}. Resume with what it was written with"
                + ("." if self.fixed is not None else ", or give --allow-changed if only code or weights have changed.")
            )


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


def save_checkpoint(checkpoint: Checkpoint, now: Progress) -> None:
    """Write it, in one step."""
    pool_counts(now)
    buffer = {name: brought(v) for name, v in now.buffer.state_dict().items()}
    if world().rank > 0:
        return
    checkpoint.save(
        {
            "iteration": now.state.iteration,
            "weights": [p.detach() for p in now.weights],
            "running": list(now.state.control.module.buffers()),
            "average": now.average,
            "optimiser": now.optimiser.state_dict(),
            "generator": now.state.generator.get_state(),
            "globals": global_generators(),
            "buffer": buffer,
            "auxiliary": {name: item.state_dict() for name, item in now.method.auxiliary.items()},
            "history": now.history,
        }
    )


def load_checkpoint(checkpoint: Checkpoint | None, now: Progress) -> None:
    """Put ``now`` where the checkpoint was. Raises TiltflowError if there is none, or it is that of another training."""
    if checkpoint is None:
        raise TiltflowError("nothing to resume: no checkpoint is kept.")
    path, saved = checkpoint.path, checkpoint.load()
    try:
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
        set_global_generators(saved["globals"])
    except TiltflowError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TiltflowError(f"{path} is no checkpoint of this training ({type(error).__name__}: {error}).") from error


def global_generators() -> dict[str, Any]:
    """The states of the generators that code of the user's may draw from: PyTorch's, NumPy's and Python's own."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]  # the legacy state is a tuple
        "python": random.getstate(),
    }


def set_global_generators(saved: Mapping[str, Any]) -> None:
    """Put them where they were."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, following = saved["python"]
    random.setstate((version, tuple(internal), following))


def seed_global_generators(seed: int) -> None:
    """Seed them, so that code of the user's draws the same in every run."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
