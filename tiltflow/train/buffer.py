"""Training items of the last rounds: tensors that share their first axis, saved with the run. Processes hold shares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.train.distributed import Part, part_of, world

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
        self.rounds, self.newest = rounds, 0
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
        kept, self.newest = self.state_dict(), lengths.pop()
        rows = self.rounds * self.newest
        self.items = {name: torch.cat([kept[name].to(v.device), v])[-rows:] if kept else v for name, v in material.items()}

    def batches(
        self, size: int | None, count: int, generator: torch.Generator, most: int | None = None
    ) -> Iterator[list[tuple[Material, Part]]]:
        """``count`` mini-batches of ``size`` rows of all processes, without replacement, in parts of at most ``most`` rows.

        Everything, once each, if size is None. A part comes with the rows that are here.
        """
        n = len(self) * world().size
        whole = size is None or size >= n
        picks = [
            None if whole else torch.randperm(n, generator=generator, device=generator.device)[:size] for _ in range(count)
        ]
        for picked in picks:
            rows = n if picked is None else len(picked)
            starts = range(0, rows, most or rows)
            parts = [part_of(picked, i, min(i + (most or rows), rows), rows) for i in starts]
            yield [({name: v[_there(part.rows, v)] for name, v in self.items.items()}, part) for part in parts]

    def state_dict(self) -> Material:
        """What the next round leaves of the items, to be saved."""
        rows = (self.rounds - 1) * self.newest
        return {name: v[-rows:] for name, v in self.items.items()} if rows else {}

    def load_state_dict(self, state: Material) -> None:
        """Replace the items."""
        self.items = dict(state)
        self.newest = len(self)


def _there(rows: Tensor | slice, v: Tensor) -> Tensor | slice:
    """Numbers of rows on the device of v."""
    return rows.to(v.device) if isinstance(rows, Tensor) else rows
