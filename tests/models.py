"""Foreign models and rewards for the command-line tests, named as module:function."""

import torch
from torch import Tensor, nn

from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process


class GaussianVelocity(nn.Module):
    """The exact velocity of N(0, .25 I) data on the linear path, plus weights to train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extra = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.extra[2].weight)
        nn.init.zeros_(self.extra[2].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        exact = (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * x
        return exact + self.extra(torch.cat([x, t], 1))


def velocity() -> nn.Module:
    return GaussianVelocity()


def process() -> Process:
    return Process(Linear(), GaussianVelocity(), "velocity", (2,))


def right(x: Tensor) -> Tensor:
    return x[:, 0]


def judge(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).to(x.dtype)


def detached(x: Tensor) -> Tensor:
    return x[:, 0].detach()


def infinite(x: Tensor) -> Tensor:
    return x[:, 0] / 0


def wrong_length(x: Tensor) -> Tensor:
    return x[:-1, 0]


def constant(x: Tensor) -> Tensor:
    return 0 * x[:, 0] + 1


def total(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


class Conditional(nn.Module):
    """The exact velocity of N(m, .25 I) data, m (B, 2) the condition, plus weights to train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extra = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.extra[2].weight)
        nn.init.zeros_(self.extra[2].bias)

    def forward(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        t = t[:, None]
        slope = (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)
        return slope * (x - t * mean) + mean + self.extra(torch.cat([x, t, mean], 1))


def conditional() -> Process:
    return Process(Linear(), Conditional(), "velocity", (2,))


def means(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"mean": torch.randn(n, 2, generator=generator, device=generator.device)}


def near(x: Tensor, mean: Tensor) -> Tensor:
    return x[:, 0] - mean[:, 0]
