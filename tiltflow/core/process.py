r"""Base processes: a pretrained model seen through an interpolant, whatever it was trained to predict.

With x = αX_1 + βX_0 and v = α̇X_1 + β̇X_0, each of the four predictors determines the pair of conditional means
(X̂_1, X̂_0) = (E[X_1|x], E[X_0|x]), and the pair determines the others (W = βα̇ − αβ̇):

    velocity   X̂_1 = (βv − β̇x)/W            v = α̇X̂_1 + β̇X̂_0
    eps        X̂_1 = (x − β·eps)/α          eps = X̂_0 = (x − αX̂_1)/β
    score      X̂_1 = (x + β²s)/α            s = −X̂_0/β
    x1         X̂_1 = model(x, t)

Where α or β vanish, the pair follows by the limits of :mod:`tiltflow.core.limits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant
from tiltflow.core.limits import score_limit, velocity_limit, x1_limit

Predicts = Literal["velocity", "eps", "x1", "score"]
Model = Callable[..., Tensor]


def expand(a: Tensor, like: Tensor) -> Tensor:
    """Append singleton axes to ``a`` (B,) until it broadcasts against ``like`` (B, *event)."""
    return a.reshape(-1, *(1,) * (like.ndim - 1)).to(like.dtype)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))


def to_x1(prediction: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant, predicts: Predicts) -> Tensor:
    """X̂_1 = E[X_1|x] from any predictor's output; t (B,). Infinite where α_t = 0 for eps and score."""
    if predicts == "x1":
        return prediction
    if predicts == "velocity":
        a, b = (expand(c, x) for c in interpolant.from_velocity(t))
        return a * x + b * prediction
    alpha, beta = expand(interpolant.alpha(t), x), expand(interpolant.beta(t), x)
    noise = -beta * prediction if predicts == "eps" else beta**2 * prediction
    return (x + torch.where(beta == 0, torch.zeros_like(noise), noise)) / alpha  # x is X_1 where there is no noise


def from_x1(x1: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant, predicts: Predicts) -> Tensor:
    """The inverse of :func:`to_x1`. Infinite where β_t = 0 (t = 1) for eps and score, and for the velocity too."""
    if predicts == "x1":
        return x1
    alpha, beta = expand(interpolant.alpha(t), x), expand(interpolant.beta(t), x)
    x0 = (x - alpha * x1) / beta
    if predicts == "velocity":
        return expand(interpolant.d_alpha(t), x) * x1 + expand(interpolant.d_beta(t), x) * x0
    return x0 if predicts == "eps" else -x0 / beta


@dataclass(frozen=True)
class Process:
    """A base process: ``model(x, t, **condition)`` predicting ``predicts`` along ``interpolant``.

    Args:
        interpolant: the reference flow the model was trained on.
        model: callable ``(x (B, *event), t (B,), **condition) -> (B, *event)``; an ``nn.Module`` can be fine-tuned.
        predicts: "velocity", "eps" (the noise), "x1" (the data) or "score".
        event_shape: shape of one sample.

    Raises:
        TiltflowError: unknown ``predicts``, or an output whose shape is not the input's.
    """

    interpolant: Interpolant
    model: Model
    predicts: Predicts
    event_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Predicts):
            raise TiltflowError(
                f"predicts={self.predicts!r} is unknown; state what the model outputs: one of {get_args(Predicts)}."
            )

    def _predict(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        out = self.model(x, t, **condition)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TiltflowError(
                f"the base model returned {got} for x of shape {tuple(x.shape)}; "
                "it must return a tensor of the shape of x. Wrap it in a function that does."
            )
        return out

    def x1(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Denoised sample X̂_1 = E[X_1 | X_t = x]; where α_t = 0, its limit (:mod:`tiltflow.core.limits`)."""
        path = self.interpolant
        if self.predicts in ("velocity", "x1") or not bool((start := path.alpha(t) == 0).any()):
            return self.x1_inside(x, t, **condition)
        zero, inside = torch.zeros_like(t), torch.where(start, 0.5, t)
        limit = x1_limit(lambda s: self._predict(x, s, condition), x, zero, path, self.predicts)
        if bool(start.all()):
            return limit
        regular = self.x1_inside(x, inside, **condition)
        return torch.where(_rows(start, x), limit, regular)

    def x1_inside(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """X̂_1 where every α_t > 0 is known, so that no accelerator is asked."""
        return to_x1(self._predict(x, t, condition), x, t, self.interpolant, self.predicts)

    def velocity(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """v(x, t) = E[Ẋ_t | X_t = x]."""
        return self._convert("velocity", x, t, condition)

    def velocity_inside(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """v where every α_t, β_t > 0 is known."""
        if self.predicts == "velocity":
            return self._predict(x, t, condition)
        return from_x1(self.x1_inside(x, t, **condition), x, t, self.interpolant, "velocity")

    def x0(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Predicted noise X̂_0 = E[X_0 | X_t = x] (the ε of DDPM)."""
        return self._convert("eps", x, t, condition)

    def score(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """∇log p_t(x)."""
        return self._convert("score", x, t, condition)

    def _convert(self, to: Predicts, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        if to == self.predicts:
            return self._predict(x, t, condition)
        path = self.interpolant
        noiseless = path.beta(t) == 0
        if not bool(noiseless.any()):
            return from_x1(self.x1(x, t, **condition), x, t, path, to)
        inside = torch.where(noiseless, 0.5, t)
        regular = from_x1(self.x1(x, inside, **condition), x, inside, path, to)
        point = noiseless & (path.alpha(t) == 0)
        end = self._at_end(to, x, torch.ones_like(t), condition) if bool((noiseless & ~point).any()) else regular
        if bool(point.any()):
            end = torch.where(_rows(point, x), self._at_point(to, x, torch.zeros_like(t), condition), end)
        return torch.where(_rows(noiseless, x), end, regular)

    def _at_end(self, to: Predicts, x: Tensor, one: Tensor, condition: dict[str, Any]) -> Tensor:
        """The limits where β = 0 < α."""
        if to == "eps":
            return torch.zeros_like(x)
        limit = score_limit if to == "score" else velocity_limit
        return limit(lambda s: self._predict(x, s, condition), x, one, self.interpolant, self.predicts)

    def _at_point(self, to: Predicts, x: Tensor, zero: Tensor, condition: dict[str, Any]) -> Tensor:
        """The limits at x = 0 where β = α = 0."""
        if to == "eps":
            return torch.zeros_like(x)
        x1 = 0.5 * expand(self.interpolant.d_alpha(zero), x) * self.x1(x, zero, **condition)
        return x1 if to == "velocity" else x1 / expand(self.interpolant.eta(zero), x)

    def source(
        self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """n draws of X_0 ~ N(0, I) (of the point 0 where β_0 = 0), shape (n, *event_shape)."""
        start = torch.zeros((), dtype=torch.float64)
        if float(self.interpolant.beta(start)) == 0.0:
            return torch.zeros(n, *self.event_shape, dtype=dtype, device=device)
        return torch.randn(n, *self.event_shape, generator=generator, dtype=dtype, device=device)
