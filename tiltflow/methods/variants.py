"""Methods of the table that follow from their chain: shares of end points, numbers of steps, sizes of matrices."""

from __future__ import annotations

import torch

from tiltflow.core.chain import Chain, InterpolantChain
from tiltflow.core.control import Control
from tiltflow.core.cost import Cost
from tiltflow.methods.adjoint_matching import AdjointMatching, endpoint_share
from tiltflow.methods.log_variance import LogVariance
from tiltflow.methods.socm import SOCM, LearnedMatrices
from tiltflow.train.method import Conditions

SHARE_PATHS = 4096
"""Base paths that the share of end-point rows is measured on."""
TOGETHER = 16
"""Paths from one start that the log-variance loss compares, where starts differ in value."""


def with_endpoints(
    chain: InterpolantChain, cost: Cost, generator: torch.Generator, batch: int = 64, clip: float | None = None
) -> AdjointMatching:
    """Adjoint Matching under path weights, with the share of end-point target that the adjoint's tails call for.

    For bases whose X̂_1 is exact: the end-point target says what the chain's own denoiser is, right or not.
    """
    share = endpoint_share(chain, cost, SHARE_PATHS, generator)
    return AdjointMatching(chain, cost, batch, clip=clip, importance=True, endpoint_share=share)


def truncated(
    chain: Chain,
    cost: Cost,
    batch: int = 64,
    clip: float | None = None,
    conditions: Conditions | None = None,
    rollout: Control | None = None,
    keep: torch.device | None = None,
    micro_batch: int | None = None,
) -> AdjointMatching:
    """Adjoint Matching on the last quarter of the steps."""
    last = max(1, len(chain.t) // 4)
    return AdjointMatching(
        chain, cost, batch, last, clip=clip, conditions=conditions, rollout=rollout, keep=keep, micro_batch=micro_batch
    )


def log_variance(
    chain: Chain, cost: Cost, batch: int = 128, group: int | None = None, conditions: Conditions | None = None
) -> LogVariance:
    """The log-variance loss, among the ``group`` paths of one start where starts or conditions differ in value."""
    shared = group or (None if chain.memoryless and conditions is None else TOGETHER)
    return LogVariance(chain, cost, batch, shared, conditions=conditions)


def socm(chain: Chain, cost: Cost, batch: int = 128, conditions: Conditions | None = None) -> SOCM:
    """SOCM with learned matrices of the size of a state."""
    size = chain.source(1, torch.Generator().manual_seed(0)).shape[-1]
    return SOCM(chain, cost, LearnedMatrices(size), batch, conditions)
