r"""Base processes: a pretrained model seen through an interpolant, whatever it was trained to predict.

With x = αX_1 + βX_0 and v = α̇X_1 + β̇X_0, each of the four predictors determines the pair of conditional means
(X̂_1, X̂_0) = (E[X_1|x], E[X_0|x]), and the pair determines the others (W = βα̇ − αβ̇):

    velocity   X̂_1 = (βv − β̇x)/W            v = α̇X̂_1 + β̇X̂_0
    eps        X̂_1 = (x − β·eps)/α          eps = X̂_0 = (x − αX̂_1)/β
    score      X̂_1 = (x + β²s)/α            s = −X̂_0/β
    x1         X̂_1 = model(x, t)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant

Predicts = Literal["velocity", "eps", "x1", "score"]
Model = Callable[..., Tensor]


def expand(a: Tensor, like: Tensor) -> Tensor:
    """Append singleton axes to ``a`` (B,) until it broadcasts against ``like`` (B, *event)."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim)).to(like.dtype)


def to_x1(prediction: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant, predicts: Predicts) -> Tensor:
    """X̂_1 = E[X_1|x] from any predictor's output; t (B,). Infinite where α_t = 0 for eps and score."""
    if predicts == "x1":
        return prediction
    alpha, beta = expand(interpolant.alpha(t), x), expand(interpolant.beta(t), x)
    if predicts == "velocity":
        d_beta = expand(interpolant.d_beta(t), x)
        return (beta * prediction - d_beta * x) / expand(interpolant.wronskian(t), x)
    if predicts == "eps":
        return (x - beta * prediction) / alpha
    return (x + beta**2 * prediction) / alpha


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
        """Denoised sample X̂_1 = E[X_1 | X_t = x]."""
        return to_x1(self._predict(x, t, condition), x, t, self.interpolant, self.predicts)

    def velocity(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """v(x, t) = E[Ẋ_t | X_t = x]."""
        return self._convert("velocity", x, t, condition)

    def x0(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Predicted noise X̂_0 = E[X_0 | X_t = x] (the ε of DDPM)."""
        return self._convert("eps", x, t, condition)

    def score(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """∇log p_t(x)."""
        return self._convert("score", x, t, condition)

    def _convert(self, to: Predicts, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        out = self._predict(x, t, condition)
        if to == self.predicts:
            return out
        return from_x1(to_x1(out, x, t, self.interpolant, self.predicts), x, t, self.interpolant, to)

    def source(
        self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """n draws of X_0 ~ N(0, I) (of the point 0 where β_0 = 0), shape (n, *event_shape)."""
        start = torch.zeros((), dtype=torch.float64)
        if float(self.interpolant.beta(start)) == 0.0:
            return torch.zeros(n, *self.event_shape, dtype=dtype, device=device)
        return torch.randn(n, *self.event_shape, generator=generator, dtype=dtype, device=device)
