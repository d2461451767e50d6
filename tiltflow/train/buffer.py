"""A ring of training items: tensors that share their first axis, kept between rounds and saved with the run."""

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
    """Holds the newest ``capacity`` items (None: the last round only).

    Every item is one row of each tensor of a :data:`Material`, e.g. x (n, *event), k (n,), a (n, *event).

    Raises:
        TiltflowError: a capacity below 1.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise TiltflowError(f"a buffer holds at least one item, not {capacity}; None keeps the last round only.")
        self.capacity = capacity
        self.items: Material = {}

    def __len__(self) -> int:
        return len(next(iter(self.items.values()))) if self.items else 0

    def add(self, material: Material) -> None:
        """Append a round. Raises TiltflowError if its names or row counts disagree."""
        if len({len(v) for v in material.values()}) != 1 or (self.items and set(material) != set(self.items)):
            raise TiltflowError(
                f"a round of material must have rows of equal number and the names {sorted(self.items)}; "
                f"got { {name: len(v) for name, v in material.items()} }."
            )
        if self.capacity is None or not self.items:
            self.items = dict(material)
        else:
            self.items = {name: torch.cat([old, material[name]]) for name, old in self.items.items()}
        if self.capacity is not None:
            self.items = {name: v[-self.capacity :] for name, v in self.items.items()}

    def batches(self, size: int | None, updates: int, generator: torch.Generator) -> list[Material]:
        """``updates`` mini-batches of ``size`` rows without replacement (everything, once each, if size is None)."""
        if size is None or size >= len(self):
            return [self.items] * updates
        rows = [torch.randperm(len(self), generator=generator, device=generator.device)[:size].cpu() for _ in range(updates)]
        return [{name: v[r] for name, v in self.items.items()} for r in rows]

    def state_dict(self) -> Material:
        """The items, to be saved."""
        return dict(self.items)

    def load_state_dict(self, state: Material) -> None:
        """Replace the items."""
        self.items = dict(state)
