r"""Controls with their own step variance: how it is learned, and which methods cannot have it."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain
from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control, DriftControl, StepVariance
from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import event_sum
from tiltflow.train.buffer import Material
from tiltflow.train.distributed import everyone, once


def require_base_variance(method: object, chain: Chain, control: Control) -> None:
    """Raises TiltflowError if a step of the control has another variance than s_k², on which ``method`` is built."""
    if control.ratios(chain) is not None:
        raise TiltflowError(
            f"{type(method).__name__} is derived for steps of the base's variance s_k², and this control has its own "
            "(StepVariance): train it without, or use AdjointMatching, AdjointSampling or LogVariance."
        )


@torch.no_grad()
def update_step_variance(
    control: Control,
    chain: BrownianChain,
    x1: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    x0: Tensor | None = None,
    condition: Material | None = None,
) -> None:
    """Move the v_k/R_k of a control with :class:`~tiltflow.core.control.StepVariance` a fifth of the way to this round's.

    v_k = E‖X_1 − X_k − R_k b(X_k)‖²/d over weighted ambient end points x1 (n, *event), at each step an eighth of them, or
    enough for 2,048 numbers. What the drift has not learned yet counts as variance. Of several processes each gives its
    own end points, sources and conditions, and the weights of all.
    """
    if not isinstance(control, DriftControl) or not isinstance(control.module, StepVariance):
        return
    x1, x0 = everyone(x1), None if x0 is None else everyone(x0)
    rows_of = {name: everyone(v) for name, v in (condition or {}).items()}
    steps, dimension = len(chain.std), chain.geometry.dimension(chain.event_shape)
    rows = max(len(x1) // 8, min(len(x1), 64, -(-2048 // dimension)))
    pick = torch.multinomial(weight, rows * steps, replacement=True, generator=generator)
    k = torch.arange(steps, device=x1.device).repeat_interleave(rows)
    ends, starts = x1[pick], torch.zeros_like(x1[pick]) if x0 is None else x0[pick]
    with once():
        x, _ = chain.bridge(k, starts, ends, generator)
    rows_of = {name: v[pick] for name, v in rows_of.items()}
    error = event_sum((ends - x - at(chain.remaining, k, x) * control.drift(chain, k, x, **rows_of)) ** 2)
    found = double(error).reshape(steps, rows).mean(1) / dimension
    control.module.share.lerp_((found / chain.remaining[:-1]).clamp_max(1.0).to(control.module.share), 0.2)
