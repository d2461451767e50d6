"""Trained methods, one file per idea: ``collect(state) -> Round`` and ``loss(control, material) -> scalar``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tiltflow.buffer import Material
from tiltflow.control import Control


@dataclass
class State:
    """What a method may read while collecting; :func:`tiltflow.fit.fit` owns and checkpoints it.

    ``auxiliary`` names further trained or averaged objects with ``state_dict``/``load_state_dict``.
    """

    control: Control
    generator: torch.Generator
    iteration: int = 0
    auxiliary: dict[str, Any] = field(default_factory=dict)


class Round(NamedTuple):
    """Training rows, scalar metrics of the round, and curves for the report."""

    material: Material
    metrics: dict[str, float]
    curves: dict[str, list[float]]


class Method(Protocol):
    """A trained method holds settings only; all that changes lives in :class:`State`."""

    def collect(self, state: State) -> Round:
        """Simulate and label."""
        ...

    def loss(self, control: Control, material: Material) -> Tensor:
        """Scalar loss of a batch of rows."""
        ...
