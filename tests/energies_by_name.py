"""Energies for the command-line tests, named as module:function."""

import torch
from torch import Tensor

from tiltflow.energies import EnergyProblem


def bowl(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(1)


def problem() -> EnergyProblem:
    return EnergyProblem(name="bowl", energy=bowl, event_shape=(2,), scale=2.0, finest=0.1)


def springs(x: Tensor) -> Tensor:
    return 0.5 * (x - x.mean(1, keepdim=True)).square().sum((1, 2))


def labelled(x: Tensor) -> Tensor:
    return springs(x) + (x[:, 0] - x[:, 1]).square().sum(1)


def angles(x: Tensor) -> Tensor:
    return -x.cos().sum(1)


class Forces:
    """A force provider; the class itself is named, and called."""

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return bowl(x.detach()), -x.detach()


def detached(x: Tensor) -> Tensor:
    return bowl(x.detach())


def wrong_length(x: Tensor) -> Tensor:
    return bowl(x)[:-1]


def nan(x: Tensor) -> Tensor:
    return bowl(x) / 0 * 0


def constant(x: Tensor) -> Tensor:
    return 0 * bowl(x) + 1


def raises(x: Tensor) -> Tensor:
    raise KeyError("no such atom")


NUMBER = 3


def wrong_forces() -> object:
    class Flipped(Forces):
        def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
            energy, forces = super().energy_and_forces(x)
            return energy, -forces

    return Flipped()


def blow_up(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] > 0, torch.nan, bowl(x))
