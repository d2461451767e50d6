"""The chain that fine-tuning simulates, and the network that starts at the base."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tiltflow.core.chain import InterpolantChain, euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import Blend
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant
from tiltflow.core.noise import Constant, Memoryless, memoryless_residual
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.progress import Tell, silent
from tiltflow.nn.lora import add_low_rank
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.train.method import Conditions

RESIDUAL_TOLERANCE = 0.1
IMAGE_AXES = 3
"""Of an event that is an image, (channels, height, width), or more: it ends noiselessly."""


def require_memoryless(path: Interpolant, settings: FinetuneSettings) -> None:
    """Raise TiltflowError for a schedule whose residual correlation exceeds .1, unless it was asked for by name."""
    schedule = Constant(settings.sigma) if settings.sigma is not None else Memoryless(path, chi=settings.chi)
    residual = memoryless_residual(path, schedule)
    if not residual <= RESIDUAL_TOLERANCE and not settings.allow_biased:
        what = f"sigma={settings.sigma}" if settings.sigma is not None else "the memoryless schedule of this interpolant"
        raise TiltflowError(
            f"{what} is not memoryless: corr(X_0, X_1) = {residual:.2f} on unit Gaussian data (tolerance "
            f"{RESIDUAL_TOLERANCE}), so fine-tuning would not reach p_base·exp(λr). Leave sigma out, or pass allow_biased "
            "to get the bias on purpose."
        )


def ends_noiselessly(base: Process, settings: FinetuneSettings) -> bool:
    """Whether paths end with the noiseless prediction."""
    return len(base.event_shape) >= IMAGE_AXES if settings.noiseless_last is None else settings.noiseless_last


def training_chain(
    base: Process,
    settings: FinetuneSettings,
    generator: torch.Generator,
    conditions: Conditions | None = None,
    tell: Tell = silent,
) -> InterpolantChain:
    """The Gaussian chain that fine-tuning simulates, on the generator's device.

    Raises:
        TiltflowError: a schedule that remembers its start (residual correlation above .1), unless asked for by name.
    """
    t, path = uniform_grid(settings.steps), base.interpolant
    require_memoryless(path, settings)
    if settings.sigma is not None:
        return euler_maruyama(base, t, Constant(settings.sigma))
    if settings.chi != 0.0:
        return euler_maruyama(base, t, Memoryless(path, offset=1 / settings.steps, chi=settings.chi))
    n, what, parts = settings.variance_samples, "variances of the chain", settings.steps + 1
    tell(what, 0, parts, "")
    condition: dict[str, Any] = conditions(n, generator) if conditions else {}
    x0 = base.source(n, generator, torch.get_default_dtype(), generator.device)
    x1 = ode(base, x0, settings.steps, "heun", **condition)
    tell(what, 1, parts, "")
    v = residual_variance(base, t, x1, generator, tell=lambda done: tell(what, 1 + done, parts, ""), **condition)
    return memoryless_chain(base, t, v, ends_noiselessly(base, settings))


def trainable_copy(base: Process, rank: int | None = None, generator: torch.Generator | None = None) -> nn.Module:
    """The base model's own copy in evaluation mode, all weights trainable, or low-rank updates of them only.

    Raises:
        TiltflowError: the model is not an ``nn.Module``.
    """
    if not isinstance(base.model, nn.Module):
        raise TiltflowError(
            f"the base model is a {type(base.model).__name__} without weights of its own; fine-tuning needs an nn.Module. "
            "Pass `tuned=tiltflow.tilted(base, net)` to train a correction `net` instead."
        )
    model = copy.deepcopy(base.model).eval().requires_grad_(True)  # dropout would draw unrecorded noise
    return model if rank is None else add_low_rank(model, rank, generator or torch.Generator().manual_seed(0))


def tuned_process(base: Process, model: nn.Module) -> Process:
    """The process of a network that starts at the base: itself, or a :class:`Blend` if it predicts x1."""
    if base.predicts == "x1":
        model = Blend(base, model)
    return Process(base.interpolant, model, base.predicts, base.event_shape)
