"""What a job needs to know of a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiltflow.core.cost import Reward
from tiltflow.train.method import Conditions


class RewardSpec(NamedTuple):
    """A reward with its held-out judges and, if it is conditional, where its conditions come from.

    ``conditions`` and ``unseen`` draw rows for training and for the evaluation; ``judge_rows`` of the unseen draw hold what
    only the judges may see. ``adapt`` makes the network to train, which sees the condition, from a copy of the base's.
    """

    reward: Reward
    judges: dict[str, Callable[..., Tensor]]
    conditions: Conditions | None = None
    unseen: Callable[[int, torch.Generator], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None
    adapt: Callable[[nn.Module], nn.Module] | None = None
