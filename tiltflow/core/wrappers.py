r"""Models of other libraries as a :class:`~tiltflow.core.process.Process`: flow_matching's wrappers, azula's denoisers.

    library        time           state                        model
    flow_matching  as here        X_t = α_t X_1 + σ_t X_0      velocity E[Ẋ_t | x]
    azula          1 − t          X_t = α_t X + σ_t Z          posterior mean E[X | x_t]

Neither is a dependency: what is passed in is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant, Linear
from tiltflow.core.process import Process

UNIT = 0.05
"""Most that the noise at the start may differ from N(0, I): in its deviation, and in the signal that is left."""


@dataclass(frozen=True)
class Scheduled(Interpolant):
    """α and β of another library's schedule τ ↦ (α, σ), with τ = 1 − t if ``reverse``; derivatives by autograd."""

    schedule: Any
    reverse: bool

    def _pair(self, t: Tensor) -> tuple[Tensor, Tensor]:
        found = self.schedule(1 - t if self.reverse else t)
        if hasattr(found, "alpha_t"):
            return found.alpha_t, found.sigma_t
        alpha, sigma = found
        return alpha, sigma

    def alpha(self, t: Tensor) -> Tensor:
        return self._pair(t)[0]

    def beta(self, t: Tensor) -> Tensor:
        return self._pair(t)[1]

    def _slope(self, t: Tensor, which: int) -> Tensor:
        with torch.enable_grad():
            at = t.detach().requires_grad_(True)
            value = self._pair(at)[which]
            if not value.requires_grad:
                return torch.zeros_like(t)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return slope

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._slope(t, 0)

    def d_beta(self, t: Tensor) -> Tensor:
        return self._slope(t, 1)


class PosteriorMean(nn.Module):
    """X̂_1 = E[X | x_t] of an azula denoiser, with time turned round."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The posterior's mean."""
        return self.denoiser(x, 1 - t, **condition).mean


def from_flow_matching(model: nn.Module, event_shape: tuple[int, ...], scheduler: Any = None) -> Process:
    """A velocity model ``(x, t, **extras)`` of flow_matching, e.g. its ``ModelWrapper``.

    Args:
        scheduler: of the path that it was trained on, e.g. ``CosineScheduler()``; None: optimal transport, α = t.

    Raises:
        TiltflowError: a path that does not start from N(0, I).
    """
    path = Linear() if scheduler is None else Scheduled(scheduler, reverse=False)
    return Process(_from_noise(path), model, "velocity", event_shape)


def from_azula(denoiser: nn.Module, event_shape: tuple[int, ...]) -> Process:
    """A denoiser of azula, with its own schedule.

    Raises:
        TiltflowError: no schedule, or one that does not start from N(0, I), as variance exploding ones.
    """
    if not hasattr(denoiser, "schedule"):
        raise TiltflowError(f"{type(denoiser).__name__} has no schedule; give a denoiser of azula.")
    return Process(_from_noise(Scheduled(denoiser.schedule, reverse=True)), PosteriorMean(denoiser), "x1", event_shape)


def _from_noise(path: Interpolant) -> Interpolant:
    start = torch.zeros(1, dtype=torch.float64)
    alpha, beta = float(path.alpha(start)), float(path.beta(start))
    if abs(beta - 1) > UNIT or abs(alpha) > UNIT:
        raise TiltflowError(
            f"this schedule starts at {alpha:.3g}·X_1 + {beta:.3g}·X_0; the noise must be N(0, I) alone. Use a variance "
            "preserving, cosine or rectified schedule."
        )
    return path
