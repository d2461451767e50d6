"""Budgets: how many base-model evaluations and reward calls a method may spend, counted where they happen."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.control import FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.methods.registry import Trained
from tiltflow.train.buffer import Buffer
from tiltflow.train.fit import History, fit
from tiltflow.train.method import Method, State
from tiltflow.train.settings import Training


@dataclass
class Counter:
    """Samples through the base model (a backward pass is not counted apart), and through the reward."""

    base: int = 0
    reward: int = 0


class Counted(nn.Module):
    """A model that adds the rows of every call to a counter."""

    def __init__(self, model: Callable[..., Tensor], counter: Counter) -> None:
        super().__init__()
        self.model, self.counter = model, counter

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The model's answer."""
        self.counter.base += len(x)
        return self.model(x, t, **condition)

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        return Counted(copy.deepcopy(self.model, memo), self.counter)  # copies count in the same place


def counted(process: Process, counter: Counter) -> Process:
    """The process with its model's calls counted."""
    return replace(process, model=Counted(process.model, counter))


def counted_reward(reward: Callable[..., Tensor], counter: Counter) -> Callable[..., Tensor]:
    """The reward with its calls counted."""

    def call(x: Tensor, **condition: Any) -> Tensor:
        counter.reward += len(x)
        return reward(x, **condition)

    return call


@dataclass(frozen=True)
class Budget:
    """What one training may spend at most; the tighter of the two decides the number of rounds."""

    base_evaluations: int
    reward_calls: int


def fit_within(
    budget: Budget | int,
    counter: Counter,
    method: Method,
    preset: Trained,
    control: FineTuned,
    settings: Training,
    generator: torch.Generator,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    """Train for as many rounds as the budget pays for (or a given number of them).

    A pilot round on a copy of the control finds the price of one.
    The pilot and what ``method`` spent on being built are not charged, since both happen once. ``settings.minibatch`` bounds
    the rows of a step. Afterwards the counter holds what was spent.

    Raises:
        TiltflowError: a budget below the price of one round.
    """
    pilot = State(copy.deepcopy(control), torch.Generator(generator.device).manual_seed(0))
    before = replace(counter)
    material = method.collect(pilot).material
    rows = len(next(iter(material.values())))
    settings = replace(settings, gradient_steps=preset.gradient_steps, learning_rate=settings.learning_rate * preset.rate)
    if preset.rounds is None:
        settings, buffer = replace(settings, minibatch=None), Buffer()
    else:
        buffer = Buffer(preset.rounds * rows)
    collected = replace(counter)
    for batch in _full(material, preset, rows, settings.minibatch).batches(settings.minibatch, 1, pilot.generator):
        method.loss(pilot.control, batch, pilot.generator)
    base = collected.base - before.base + settings.gradient_steps * (counter.base - collected.base)
    reward = collected.reward - before.reward + settings.gradient_steps * (counter.reward - collected.reward)
    if isinstance(budget, int):
        budget = Budget(budget * max(base, 1), budget * max(reward, 1))
    rounds = min(budget.base_evaluations // max(base, 1), budget.reward_calls // max(reward, 1))
    if rounds < 1:
        raise TiltflowError(
            f"a round of {type(method).__name__} takes {base} base evaluations and {reward} reward calls, more than the "
            f"whole budget of {budget.base_evaluations} and {budget.reward_calls}."
        )
    counter.base = counter.reward = 0
    state = State(control, generator)
    return fit(method, state, replace(settings, rounds=rounds), buffer, callback=callback)


def _full(material: dict[str, Tensor], preset: Trained, rows: int, minibatch: int | None) -> Buffer:
    """A buffer as long as a full one, so that the pilot's step has the rows of a later step."""
    buffer = Buffer((preset.rounds or 1) * rows)
    for _ in range(min(preset.rounds or 1, -(-(minibatch or rows) // rows))):
        buffer.add(material)
    return buffer


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
