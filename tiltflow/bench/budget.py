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
from tiltflow.methods.registry import Row
from tiltflow.train.buffer import Buffer, Material
from tiltflow.train.fit import Callback, History, fit
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
    row: Row,
    control: FineTuned,
    settings: Training,
    generator: torch.Generator,
    callback: Callback | None = None,
) -> History:
    """Train for as many rounds as the budget pays for (or a given number of them).

    A pilot round on a copy of the control finds the price of one.
    The pilot and what ``method`` spent on being built are not charged, since both happen once. The training of ``row``
    replaces that of the settings, whose minibatch bounds the rows of a step where the method keeps rounds. Afterwards the
    counter holds what was spent.

    Raises:
        TiltflowError: a budget below the price of one round.
    """
    pilot = State(copy.deepcopy(control), torch.Generator(generator.device).manual_seed(0))
    before = replace(counter)
    material = method.collect(pilot).material
    settings = replace(settings, **{**row.training, "learning_rate": settings.learning_rate * row.rate})
    collected = replace(counter)
    for [(rows, _)] in _full(material, settings).batches(settings.minibatch, 1, pilot.generator):
        method.loss(pilot.control, rows, pilot.generator)
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
    return fit(method, state, replace(settings, rounds=rounds), callback=callback)


def _full(material: Material, settings: Training) -> Buffer:
    """A buffer as long as a full one, or at least as a minibatch, so that the pilot's step has the rows of a later step."""
    buffer, rows = Buffer(settings.buffer_rounds), len(next(iter(material.values())))
    for _ in range(min(settings.buffer_rounds, -(-(settings.minibatch or rows) // rows))):
        buffer.add(material)
    return buffer


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
