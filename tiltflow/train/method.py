"""Methods, one file per idea.

Trained ones have ``collect(state) -> Round`` and ``loss(control, material, generator) -> scalar`` and run in
:func:`tiltflow.train.fit.fit`; training-free ones have ``sample(control, n, generator) -> Weighted``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tiltflow.core.control import Control
from tiltflow.train.buffer import Material

# draws one condition row per path: (n, generator) -> {name: (n, …)}
Conditions = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass
class State:
    """What a method may read while collecting; :func:`tiltflow.train.fit.fit` owns and checkpoints it."""

    control: Control
    generator: torch.Generator
    iteration: int = 0


class Round(NamedTuple):
    """Training rows, scalar metrics of the round, and curves for the report."""

    material: Material
    metrics: dict[str, float]
    curves: dict[str, list[float]]


class Method(Protocol):
    """A trained method holds settings only; all that changes lives in :class:`State` or is named in ``auxiliary``."""

    @property
    def auxiliary(self) -> dict[str, Any]:
        """Further objects with ``state_dict``/``load_state_dict``: ``fit`` checkpoints them and trains the modules."""
        return {}

    def collect(self, state: State) -> Round:
        """Simulate and label."""
        ...

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """Scalar loss of a batch of rows, differentiable in the control's weights."""
        ...


class Weighted(NamedTuple):
    """Samples of a training-free method.

    x: (n, *event). log_weights: (n,), so that Σ softmax(log_weights) δ_x estimates p*; zeros where the method claims
    unweighted samples. log_z: its estimate of log Z = log E_base[e^{−g}], or None.
    """

    x: Tensor
    log_weights: Tensor
    log_z: float | None


class TrainingFree(Protocol):
    """A training-free method. ``control`` None starts from the base, else from a fine-tuned model."""

    def sample(self, control: Control | None, n: int, generator: torch.Generator, **condition: Any) -> Weighted:
        """n samples."""
        ...
