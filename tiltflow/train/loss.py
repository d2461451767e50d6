r"""The matching loss: half the squared distance between the control of a step and its adjoint target,

    L = mean over items of ½ w_k ‖u_k + s_k ã_{k+1}‖²,     u_k = (mean_u − mean_base)/s_k,

with the two ways to tame heavy tails: a per-term clip min(c, ·) before the mean (never after backward), and a mask that
drops terms above a moving average of their own quantile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.core.chain import Chain, at
from tiltflow.core.control import Control
from tiltflow.core.device import double
from tiltflow.core.simulate import event_sum


def matching_terms(
    control: Control, chain: Chain, x: Tensor, k: Tensor, a_next: Tensor, base_mean: Tensor, **condition: Any
) -> Tensor:
    """½‖u_k + s_k ã_{k+1}‖² for each item, (n,), differentiable in the control's weights.

    x, a_next, base_mean: (n, *event); k: LongTensor (n,) of steps.
    """
    std = at(chain.std, k, x)
    u = (control.mean(chain, k, x, base_mean=base_mean, **condition) - base_mean) / std
    return 0.5 * event_sum((u + std * a_next) ** 2)


class QuantileMask:
    """Keeps terms below an exponential moving average of their own ``quantile``; the average is training state."""

    def __init__(self, quantile: float = 0.9, decay: float = 0.99) -> None:
        self.quantile, self.decay = quantile, decay
        self.threshold = torch.tensor(float("inf"), dtype=torch.float64)

    def __call__(self, terms: Tensor) -> Tensor:
        """Boolean mask (n,), after updating the average with these terms."""
        now = torch.quantile(double(terms.detach()), self.quantile)
        old = self.threshold
        self.threshold = now if bool(torch.isinf(old)) else self.decay * old + (1 - self.decay) * now
        return terms.detach() <= self.threshold.to(terms)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, to be saved."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the average."""
        self.threshold = state["threshold"]


def reduce_terms(
    terms: Tensor, weight: Tensor | None = None, clip: float | None = None, mask: QuantileMask | None = None
) -> Tensor:
    """Weighted mean of the terms after the per-term clip and the mask; weights (n,) are used as they are."""
    if clip is not None:
        terms = terms.clamp_max(clip)
    if weight is not None:
        terms = terms * weight
    if mask is not None:
        terms = torch.where(mask(terms), terms, torch.zeros_like(terms))
    return terms.mean()
