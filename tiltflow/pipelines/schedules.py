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

from tiltflow.core.chain import posterior_step
from tiltflow.core.errors import TiltflowError

DDIM = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
"""Schedulers of whole time steps; their configs describe their noise, which DDIM's steps are taken of."""
SIGMAS = (
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
)  # fmt: skip
"""Solvers of the same models, on noise levels of their own."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
FLOW, COSINE = FLOWS[0], "CosineDPMSolverMultistepScheduler"
ASIDE = 2
"""Training times that DDIM may land aside of the one that it goes on from: its own rounding."""


class Nodes(NamedTuple):
    """alpha, beta (K+1,); timestep (K,), as the model wants it; p, q (K,) with X̂_1 = p x + q·output. All float64.

    landing: α and β (2, K) that each step leads to, where they are not quite those of the next node (None: they are).
    """

    alpha: Tensor
    beta: Tensor
    timestep: Tensor
    p: Tensor
    q: Tensor
    landing: Tensor | None = None

    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and s² of the steps, (K,) each."""
        if self.landing is None:
            return posterior_step(self.alpha, self.beta)
        starts = torch.stack([self.alpha[:-1], self.beta[:-1]])
        pairs = [posterior_step(*torch.stack([starts[:, k], self.landing[:, k]], 1)) for k in range(len(self.timestep))]
        a, b, variance = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return a, b, variance


def nodes_of(scheduler: Any, steps: int, **options: Any) -> Nodes:
    """The nodes of ``steps`` steps of a diffusers scheduler, which is not changed.

    Args:
        options: what the pipeline passes to ``set_timesteps`` (``sigmas``, ``mu``) of a flow-matching scheduler. A shift is
            the scheduler's own business: it is in the sigmas that come back, and must not be in those that go in.

    Raises:
        TiltflowError: an unknown scheduler, one that clips X̂_1, whose steps do not meet, or whose noise rises.
    """
    name = type(scheduler).__name__
    if name in DDIM:
        nodes = _ddim(scheduler, steps)
    elif name in SIGMAS:
        nodes = _sigmas(scheduler, steps, options)
    elif name in FLOWS:
        nodes = _flow(scheduler, steps, options)
    elif name == COSINE:
        nodes = _cosine(scheduler, steps)
    else:
        known = ", ".join((*DDIM, *SIGMAS, *FLOWS, COSINE))
        raise TiltflowError(f"scheduler {name} is unknown: its noise levels cannot be told. Known: {known}.")
    ratio = nodes.beta / nodes.alpha  # ∞ where α = 0
    if not bool((ratio[1:] <= ratio[:-1]).all()):
        raise TiltflowError(
            f"the noise of {name} rises from step to step: β/α = {[round(r, 4) for r in ratio.tolist()]}. Is the "
            "schedule inverted?"
        )
    return nodes


def _require_no_clip(scheduler: Any) -> None:
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        name = type(scheduler).__name__
        raise TiltflowError(f"{name} clips X̂_1, which is no Gaussian step: set clip_sample and thresholding to False.")


def _ddim(scheduler: Any, steps: int) -> Nodes:
    from diffusers import DDIMScheduler

    _require_no_clip(scheduler)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(steps)
    timestep, every = ddim.timesteps.long(), ddim.config.num_train_timesteps
    before = timestep - every // steps
    if bool(((before[:-1] - timestep[1:]).abs() > ASIDE).any()):
        raise TiltflowError(
            f"{steps} steps of {type(scheduler).__name__} do not meet: with timestep_spacing="
            f"{ddim.config.timestep_spacing!r} DDIM steps to other times than it goes on from. Take more steps, or a number "
            f"that divides {every}."
        )
    landing = torch.where(before >= 0, ddim.alphas_cumprod[before.clamp(min=0)], ddim.final_alpha_cumprod).double()
    squared = torch.cat([ddim.alphas_cumprod[timestep].double(), landing[-1:]])
    alpha, beta = squared.sqrt(), (1 - squared).sqrt()
    p, q = _from_output(ddim.config.prediction_type, alpha[:-1], beta[:-1])
    aside = None if bool((before[:-1] == timestep[1:]).all()) else torch.stack([landing, 1 - landing]).sqrt()
    return Nodes(alpha, beta, timestep.double(), p, q, aside)


def _sigmas(scheduler: Any, steps: int, options: dict[str, Any]) -> Nodes:
    """In the units of the model's input, √(1 + σ²) times smaller than the state of a scheduler that scales it."""
    _require_no_clip(scheduler)
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(**({"num_inference_steps": steps} | options))
    sigma, kind = torch.as_tensor(copy.sigmas).double(), copy.config.prediction_type
    if len(sigma) != steps + 1:
        raise TiltflowError(f"{type(scheduler).__name__} gave {len(sigma) - 1} steps for {steps}.")
    timestep = torch.as_tensor(copy.timesteps).double()
    if copy.config.get("use_flow_sigmas"):
        alpha, beta = 1 - sigma, sigma
        if kind == "v_prediction":
            raise TiltflowError(f"{type(scheduler).__name__} with use_flow_sigmas and v_prediction: α² + β² must be 1.")
    else:
        alpha = (1 + sigma**2).rsqrt()
        beta = sigma * alpha
    return Nodes(alpha, beta, timestep, *_from_output(kind, alpha[:-1], beta[:-1]))


def _from_output(kind: str, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        if not bool((alpha > 0).all()):
            raise TiltflowError("a prediction of the noise cannot start from noise alone (zero terminal SNR).")
        return 1 / alpha, -beta / alpha
    if kind == "v_prediction":
        return alpha, -beta
    if kind == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "flow_prediction":
        return torch.ones_like(alpha), -beta
    raise TiltflowError(f"prediction_type {kind!r} is unknown; use epsilon, v_prediction, sample or flow_prediction.")


def _flow(scheduler: Any, steps: int, options: dict[str, Any]) -> Nodes:
    if scheduler.config.get("invert_sigmas"):
        raise TiltflowError(f"{FLOW} with invert_sigmas: its sigma is the share of the data, not of the noise.")
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = type(scheduler) if type(scheduler).__name__ == FLOW else FlowMatchEulerDiscreteScheduler
    copy = kind.from_config(scheduler.config)
    copy.set_timesteps(**({"num_inference_steps": steps} | options))
    beta = copy.sigmas.double()
    if len(beta) != steps + 1:
        raise TiltflowError(f"{FLOW} gave {len(beta) - 1} steps for {steps}.")
    return Nodes(1 - beta, beta, copy.timesteps.double(), *_from_output("flow_prediction", 1 - beta[:-1], beta[:-1]))


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
