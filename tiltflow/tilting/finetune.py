r"""Reward fine-tuning: from a base process and a reward to a process that samples p_base(x)·e^{λr(x)}.

Adjoint Matching on the moment-matched memoryless chain of the base (Domingo-Enrich et al. 2025, arXiv:2409.08861). Because
σ² = 2η is used in training, the fine-tuned process may be sampled with the ODE or with any noise schedule and step count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiltflow.core.chain import InterpolantChain, euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import Blend, FineTuned
from tiltflow.core.cost import Reward, RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant
from tiltflow.core.noise import Constant, Memoryless, memoryless_residual
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.nn.lora import add_low_rank, merge_low_rank
from tiltflow.train.buffer import Buffer
from tiltflow.train.fit import FitSettings, History, fit
from tiltflow.train.method import Conditions, State

RESIDUAL_TOLERANCE = 0.1
MINIBATCH = 1024


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of :func:`finetune`; all of them are in a run folder's config.json.

    Args:
        iterations, batch: rounds of Adjoint Matching and paths per round.
        updates: gradient steps per round, each on up to 1,024 rows of the buffer (simulation is the expensive part).
        importance: weight paths by their path weights, tempered to an ESS of one half. Not where the reward saturates: then
            the weighted adjoint hangs on rare paths that still have a gradient, and the tilt stays too weak.
        buffer_rounds: rounds whose rows are kept and drawn from (the average over many paths is what tames the noise).
        steps: simulation steps K of the training chain (uniform grid).
        learning_rate: Adam's, with cosine decay to 1 %.
        rank: train low-rank updates of the linear layers (merged at the end) instead of all weights; None: all weights.
        last_steps, random_steps: steps regressed on each round; None: all (paper: 10 and 10 of K = 40).
        clip: per-term clip of the loss (paper: 1.6 λ²); None: no clip.
        max_reward_grad: per-sample bound on ‖λ∇r‖; None: exact gradient.
        noiseless_last: end paths with the noiseless X̂_1 of the base (images).
        variance_samples: base samples for the chain's residual variances.
        sigma: constant noise σ instead of the memoryless one. Biased; refused without ``allow_biased``.
        chi: σ² = 2η + χ. Memoryless too, but the result may then be sampled with that schedule only.
        ema, gradient_clip, checkpoint_every: see :class:`tiltflow.train.fit.FitSettings`.
    """

    iterations: int = 200
    batch: int = 64
    updates: int = 4
    importance: bool = True
    buffer_rounds: int = 4
    steps: int = 40
    learning_rate: float = 3e-4
    rank: int | None = None
    last_steps: int | None = None
    random_steps: int = 0
    clip: float | None = None
    max_reward_grad: float | None = None
    noiseless_last: bool = False
    variance_samples: int = 512
    sigma: float | None = None
    allow_biased: bool = False
    chi: float = 0.0
    ema: float = 0.97
    gradient_clip: float = 1.0
    checkpoint_every: int = 25


class Tuned(NamedTuple):
    """The fine-tuned process, the chain it was trained on, and the training history."""

    process: Process
    chain: InterpolantChain
    history: History


def require_memoryless(path: Interpolant, settings: FinetuneSettings) -> None:
    """Raise TiltflowError for a schedule whose residual correlation exceeds .1, unless it was asked for by name."""
    schedule = Constant(settings.sigma) if settings.sigma is not None else Memoryless(path, chi=settings.chi)
    residual = memoryless_residual(path, schedule)
    if residual > RESIDUAL_TOLERANCE and not settings.allow_biased:
        what = f"sigma={settings.sigma}" if settings.sigma is not None else "the memoryless schedule of this interpolant"
        raise TiltflowError(
            f"{what} is not memoryless: corr(X_0, X_1) = {residual:.2f} on unit Gaussian data (tolerance "
            f"{RESIDUAL_TOLERANCE}), so fine-tuning would not reach p_base·exp(λr). Leave sigma out, or pass allow_biased "
            "to get the bias on purpose."
        )


def training_chain(
    base: Process,
    settings: FinetuneSettings,
    generator: torch.Generator,
    conditions: Conditions | None = None,
    device: Any = "cpu",
) -> InterpolantChain:
    """The Gaussian chain that fine-tuning simulates.

    Raises:
        TiltflowError: a schedule that remembers its start (residual correlation above .1), unless asked for by name.
    """
    t, path = uniform_grid(settings.steps), base.interpolant
    require_memoryless(path, settings)
    if settings.sigma is not None:
        return euler_maruyama(base, t, Constant(settings.sigma))
    if settings.chi != 0.0:
        return euler_maruyama(base, t, Memoryless(path, offset=1 / settings.steps, chi=settings.chi))
    n = settings.variance_samples
    condition: dict[str, Any] = conditions(n, generator) if conditions else {}
    x0 = base.source(n, generator, torch.get_default_dtype(), device)
    x1 = ode(base, x0, settings.steps, "heun", **condition)
    v = residual_variance(base, t, x1, generator, **condition)
    return memoryless_chain(base, t, v, settings.noiseless_last)


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


def finetune(
    base: Process,
    reward: Reward,
    strength: float = 1.0,
    settings: FinetuneSettings | None = None,
    *,
    generator: torch.Generator | None = None,
    tuned: Process | None = None,
    conditions: Conditions | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Tuned:
    """Fine-tune ``base`` so that it samples p_base(x)·exp(strength · reward(x)), normalised.

    Args:
        base: the pretrained process, in evaluation mode; its weights are not touched.
        reward: ``(x (B, *event), **condition) -> (B,)``, differentiable.
        strength: λ ≥ 0. 0 returns an exact copy.
        settings: budget and options (defaults: :class:`FinetuneSettings`).
        generator: random numbers (default: seed 0, on the CPU).
        tuned: process to train instead of a copy of the base; it must start at the base (:func:`tiltflow.tilted`).
        conditions: draws condition rows for base, tuned process and reward, ``(n, generator) -> {name: (n, …)}``.
        checkpoint, resume, callback: see :func:`tiltflow.train.fit.fit`.

    Raises:
        TiltflowError: λ < 0, a schedule that is not memoryless, a reward or base of the wrong shape, detached or
            non-finite, or diverging training.
    """
    settings = settings or FinetuneSettings()
    generator = generator or torch.Generator().manual_seed(0)
    cost = RewardCost(reward, strength, settings.max_reward_grad)
    process = tuned or tuned_process(base, trainable_copy(base, settings.rank, generator))
    chain = training_chain(base, settings, generator, conditions, generator.device)
    control = FineTuned(process)
    if strength == 0:
        merge_low_rank(control.module)
        return Tuned(process, chain, [])
    probe: dict[str, Tensor] = conditions(2, generator) if conditions else {}
    cost.grad(base.source(2, generator, torch.get_default_dtype(), generator.device), **probe)  # fail before the work starts
    method = AdjointMatching(
        chain,
        cost,
        batch=settings.batch,
        last_steps=settings.last_steps,
        random_steps=settings.random_steps,
        clip=settings.clip,
        importance=settings.importance,
        conditions=conditions,
    )
    controlled = settings.steps - int(settings.noiseless_last and chain.memoryless)
    regressed = controlled if settings.last_steps is None else settings.last_steps + settings.random_steps
    history = fit(
        method,
        State(control, generator),
        FitSettings(
            settings.iterations,
            learning_rate=settings.learning_rate,
            warmup=5,
            updates=settings.updates,
            minibatch=min(regressed * settings.batch, MINIBATCH),
            gradient_clip=settings.gradient_clip,
            ema=settings.ema,
            checkpoint_every=settings.checkpoint_every,
        ),
        Buffer(settings.buffer_rounds * regressed * settings.batch),
        checkpoint=checkpoint,
        resume=resume,
        callback=callback,
    )
    merge_low_rank(control.module)
    return Tuned(process, chain, history)
