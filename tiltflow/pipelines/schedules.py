r"""diffusers schedulers as the nodes of a memoryless chain: the only place where their time is turned round.

A scheduler goes from large noise to none; node k = 0 … K of the chain is its state before step k, x_k = α_k X_1 + β_k X_0
with X_0 ~ N(0, I), and the last node is what it returns. From the model's output o at node k

    epsilon       X̂_1 = (x − βo)/α            v_prediction  X̂_1 = αx − βo          (α² + β² = 1)
    sample        X̂_1 = o                      flow          X̂_1 = x − βo            (α + β = 1, o = X_0 − X_1)

so X̂_1 = p_k x + q_k o. A step k → k + 1 is the posterior of the noising kernel given X_1 = X̂_1: DDIM with η = 1 (Song et al.
2021, arXiv:2010.02502) for variance-preserving schedules, and the same formula for flow matching, whose limit K → ∞ is the
memoryless SDE with σ² = 2β/α.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

VARIANCE_PRESERVING = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Samplers of the same kind of model: their configs describe its noise, which is all that is taken from them."""
FLOW, COSINE = "FlowMatchEulerDiscreteScheduler", "CosineDPMSolverMultistepScheduler"


class Nodes(NamedTuple):
    """alpha, beta (K+1,); timestep (K,), as the model wants it; p, q (K,) with X̂_1 = p x + q·output. All float64."""

    alpha: Tensor
    beta: Tensor
    timestep: Tensor
    p: Tensor
    q: Tensor


def nodes_of(scheduler: Any, steps: int, **options: Any) -> Nodes:
    """The nodes of ``steps`` steps of a diffusers scheduler, which is not changed.

    Args:
        options: what the pipeline passes to ``set_timesteps`` (``sigmas``, ``mu``) of a flow-matching scheduler. A shift is
            the scheduler's own business: it is in the sigmas that come back, and must not be in those that go in.

    Raises:
        TiltflowError: an unknown scheduler, one that clips X̂_1, whose steps do not meet, or whose noise rises.
    """
    name = type(scheduler).__name__
    if name in VARIANCE_PRESERVING:
        nodes = _variance_preserving(scheduler, steps)
    elif name == FLOW:
        nodes = _flow(scheduler, steps, options)
    elif name == COSINE:
        nodes = _cosine(scheduler, steps)
    else:
        known = ", ".join((*VARIANCE_PRESERVING, FLOW, COSINE))
        raise TiltflowError(f"scheduler {name} is unknown: its noise levels cannot be told. Known: {known}.")
    ratio = nodes.beta / nodes.alpha  # ∞ where α = 0
    if not bool((ratio[1:] <= ratio[:-1]).all()):
        raise TiltflowError(
            f"the noise of {name} rises from step to step: β/α = {[round(r, 4) for r in ratio.tolist()]}. Is the "
            "schedule inverted?"
        )
    return nodes


def _variance_preserving(scheduler: Any, steps: int) -> Nodes:
    from diffusers import DDIMScheduler

    name, config = type(scheduler).__name__, scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        raise TiltflowError(f"{name} clips X̂_1, which is no Gaussian step: set clip_sample and thresholding to False.")
    if config.get("use_flow_sigmas"):
        raise TiltflowError(f"{name} with use_flow_sigmas: load the pipeline with {FLOW} instead.")
    ddim = DDIMScheduler.from_config(config, clip_sample=False)
    ddim.set_timesteps(steps)
    timestep = ddim.timesteps.long()
    before = timestep - ddim.config.num_train_timesteps // steps
    if not bool((before[:-1] == timestep[1:]).all()):
        raise TiltflowError(
            f"{steps} steps of {name} do not meet: with timestep_spacing={ddim.config.timestep_spacing!r} DDIM steps to "
            f"other times than it goes on from. Choose a number of steps that divides {ddim.config.num_train_timesteps}, or "
            "the spacing 'leading'."
        )
    last = ddim.alphas_cumprod[before[-1]] if before[-1] >= 0 else ddim.final_alpha_cumprod
    squared = torch.cat([ddim.alphas_cumprod[timestep], last.reshape(1)]).double()
    alpha, beta = squared.sqrt(), (1 - squared).sqrt()
    return Nodes(alpha, beta, timestep.double(), *_from_output(ddim.config.prediction_type, alpha[:-1], beta[:-1]))


def _from_output(kind: str, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        if not bool((alpha > 0).all()):
            raise TiltflowError("a prediction of the noise cannot start from noise alone (zero terminal SNR).")
        return 1 / alpha, -beta / alpha
    if kind == "v_prediction":
        return alpha, -beta
    if kind == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    raise TiltflowError(f"prediction_type {kind!r} is unknown; use epsilon, v_prediction or sample.")


def _flow(scheduler: Any, steps: int, options: dict[str, Any]) -> Nodes:
    if scheduler.config.get("invert_sigmas"):
        raise TiltflowError(f"{FLOW} with invert_sigmas: its sigma is the share of the data, not of the noise.")
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(**({"num_inference_steps": steps} | options))
    beta = copy.sigmas.double()
    if len(beta) != steps + 1:
        raise TiltflowError(f"{FLOW} gave {len(beta) - 1} steps for {steps}.")
    return Nodes(1 - beta, beta, copy.timesteps.double(), torch.ones(steps, dtype=torch.float64), -beta[:-1])


def _cosine(scheduler: Any, steps: int) -> Nodes:
    """In the units of the model's input, √(1 + σ²) times smaller than the scheduler's own state."""
    if scheduler.config.sigma_data != 1:
        raise TiltflowError(f"{COSINE} with sigma_data {scheduler.config.sigma_data}: only 1 is supported.")
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(steps)
    sigma = copy.sigmas.double()
    alpha = (1 + sigma**2).rsqrt()
    beta = sigma * alpha
    return Nodes(alpha, beta, copy.timesteps.double(), *_from_output(copy.config.prediction_type, alpha[:-1], beta[:-1]))
