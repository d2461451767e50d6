r"""Flow matching: learn a base process from data by regression.

Draw t ~ U(0, 1), X_0 ~ N(0, I), X_1 from the data, and set x = α_t X_1 + β_t X_0. The velocity minimises

    L = E ‖v(x, t) − (α̇ X_1 + β̇ X_0)‖² / d

(Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003), because
E[α̇X_1 + β̇X_0 | x] = v(x, t). Any other predictor is affine in the velocity, so the same loss is a weighted
regression of what the network does predict (W = βα̇ − αβ̇, d entries per sample):

    predicts   error                       weight
    velocity   v − (α̇ X_1 + β̇ X_0)         1
    x1         X̂_1 − X_1                   (W / max(β, floor))²
    eps        ε − X_0                     (W / max(α, floor))²
    score      β s + X_0                   (W / max(α, floor))²

`floor` keeps the weight finite where the conversion to a velocity is singular; a weight that depends on t
alone does not move the minimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.control import Control, FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process, expand
from tiltflow.train.buffer import Material
from tiltflow.train.fit import History, fit
from tiltflow.train.method import Method, Round, State
from tiltflow.train.settings import Training

__all__ = ["FlowMatching", "drop_labels", "flow_matching_loss", "pretrain", "regression_loss"]

Draw = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(n, generator) -> n data points (n, *event) and their conditions, each (n, ...)."""


def regression_loss(
    process: Process, x1: Tensor, x0: Tensor, t: Tensor, *, floor: float = 0.05, **condition: Any
) -> Tensor:
    """The loss above for given data x1, noise x0 (B, *event), times t (B,): a scalar, averaged over B and d.

    Raises:
        TiltflowError: x1 is not a batch of the process's events.
    """
    if x1.shape[1:] != process.event_shape:
        raise TiltflowError(
            f"the data have events of shape {tuple(x1.shape[1:])}, the process {tuple(process.event_shape)}; "
            "reshape the data or build the process with their shape."
        )
    flow = process.interpolant
    alpha, beta, wronskian = (expand(f(t), x1) for f in (flow.alpha, flow.beta, flow.wronskian))
    prediction = process.model(alpha * x1 + beta * x0, t, **condition)
    if process.predicts == "velocity":
        error = prediction - expand(flow.d_alpha(t), x1) * x1 - expand(flow.d_beta(t), x1) * x0
    elif process.predicts == "x1":
        error = (prediction - x1) * wronskian / beta.clamp(min=floor)
    else:
        noise = prediction if process.predicts == "eps" else -beta * prediction
        error = (noise - x0) * wronskian / alpha.clamp(min=floor)
    return error.square().mean()


def flow_matching_loss(
    process: Process, x1: Tensor, generator: torch.Generator, *, floor: float = 0.05, **condition: Any
) -> Tensor:
    """:func:`regression_loss` at noise ~ N(0, I) and times ~ U(0, 1) drawn from the generator."""
    t = torch.rand(len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    return regression_loss(process, x1, x0, t, floor=floor, **condition)


def drop_labels(labels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Labels with a random share replaced by -1 ("any"), so that one net also learns the free flow."""
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < probability
    return torch.where(dropped, -1, labels)


@dataclass(frozen=True)
class FlowMatching(Method):
    """Flow matching as a trained method: collect draws data, noise, times; loss is :func:`regression_loss`.

    Args:
        process: what to train; its model is the control's module.
        draw: the data and their conditions.
        batch: data points per round.
        floor: bound on the weight's denominator.
        precision: dtype of the matrix products on the CPU (None: the weights' own), e.g. ``torch.bfloat16``.
    """

    process: Process
    draw: Draw
    batch: int = 256
    floor: float = 0.05
    precision: torch.dtype | None = None

    def collect(self, state: State) -> Round:
        """One batch of data x1, noise x0, times t, and their conditions."""
        x1, condition = self.draw(self.batch, state.generator)
        x0 = torch.randn(x1.shape, generator=state.generator, dtype=x1.dtype, device=x1.device)
        t = torch.rand(len(x1), generator=state.generator, dtype=x1.dtype, device=x1.device)
        return Round({"x1": x1, "x0": x0, "t": t} | condition, {}, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The regression loss of a batch."""
        process = Process(
            self.process.interpolant, control.module, self.process.predicts, self.process.event_shape
        )
        enabled = self.precision is not None
        with torch.autocast("cpu", self.precision or torch.bfloat16, enabled=enabled):
            return regression_loss(process, floor=self.floor, **material)


def pretrain(
    method: FlowMatching,
    settings: Training,
    generator: torch.Generator,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    """Train the process's model in place by :func:`tiltflow.train.fit.fit`; it ends with the averaged weights."""
    state = State(FineTuned(method.process), generator)
    return fit(method, state, settings, checkpoint=checkpoint, resume=resume, callback=callback)
