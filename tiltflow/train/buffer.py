"""Training items of the last rounds: tensors that share their first axis, saved with the run."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

Material = dict[str, Tensor]
PREFIX = "condition."


def condition_rows(condition: Material) -> Material:
    """Conditions as columns of a material, one row each."""
    return {PREFIX + name: v for name, v in condition.items()}


def conditions_of(material: Material) -> Material:
    """The inverse of :func:`condition_rows`."""
    return {name.removeprefix(PREFIX): v for name, v in material.items() if name.startswith(PREFIX)}


def repeat_rows(rows: Material, times: int) -> Material:
    """Every column, ``times`` times over."""
    return {name: v.repeat(times, *(1,) * (v.ndim - 1)) for name, v in rows.items()}


class Buffer:
    """Holds the newest ``rounds`` rounds of training items, rounds as long as the last one.

    Every item is one row of each tensor of a :data:`Material`, e.g. x (n, *event), k (n,), a (n, *event).

    Raises:
        TiltflowError: less than one round.
    """

    def __init__(self, rounds: int = 1) -> None:
        if rounds < 1:
            raise TiltflowError(f"a buffer holds at least one round, not {rounds}.")
        self.rounds = rounds
        self.items: Material = {}

    def __len__(self) -> int:
        return len(next(iter(self.items.values()))) if self.items else 0

    def add(self, material: Material) -> None:
        """Append a round. Raises TiltflowError if its names or row counts disagree."""
        lengths = {len(v) for v in material.values()}
        if len(lengths) != 1 or (self.items and set(material) != set(self.items)):
            raise TiltflowError(
                f"a round of material must have rows of equal number and the names {sorted(self.items)}; "
                f"got { {name: len(v) for name, v in material.items()} }."
            )
        if self.rounds == 1 or not self.items:
            self.items = dict(material)
            return
        newest = self.rounds * lengths.pop()
        for name, new in material.items():
            old = self.items[name].to(new.device)  # of a checkpoint it is on the CPU
            self.items[name] = torch.cat([old, new])[-newest:]

    def batches(self, size: int | None, count: int, generator: torch.Generator) -> list[Material]:
        """``count`` mini-batches of ``size`` rows without replacement (everything, once each, if size is None)."""
        if size is None or size >= len(self):
            return [self.items] * count
        rows = [torch.randperm(len(self), generator=generator, device=generator.device)[:size] for _ in range(count)]
        return [{name: v[r.to(v.device)] for name, v in self.items.items()} for r in rows]

    def state_dict(self) -> Material:
        """The items, to be saved."""
        return dict(self.items)

    def load_state_dict(self, state: Material) -> None:
        """Replace the items."""
        self.items = dict(state)
