r"""Reward fine-tuning: from a base process and a reward to a model that samples p_base(x)·e^{λr(x)}.

By default Adjoint Matching on the moment-matched memoryless chain of the base (Domingo-Enrich et al. 2025,
arXiv:2409.08861). Because σ² = 2η is used in training, the fine-tuned process may be sampled with the ODE or with any noise
schedule and step count. Any other method of :mod:`tiltflow.methods.registry` goes through the same door.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiltflow.core.chain import InterpolantChain
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import Reward, RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.progress import Tell, silent
from tiltflow.core.settings import Seed, check_value
from tiltflow.methods.registry import Row, names, row_of
from tiltflow.nn.lora import merge_low_rank
from tiltflow.tilting.chain import require_memoryless, trainable_copy, training_chain, tuned_process
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.settings import DEFAULT_METHOD, FinetuneSettings
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.fit import Callback, fit
from tiltflow.train.method import Conditions, State
from tiltflow.verdict.check_base import require_base, starts_at_base
from tiltflow.verdict.check_reward import quick_check

SMALL, TRIAL, APART = 64, 16, 1e-2
"""Most entries of a vector that methods for vectors take; samples that a reward is tried on; largest relative
difference of X̂_1 at the start."""


def finetune(
    base: Process,
    reward: Reward,
    strength: float = 1.0,
    method: str | Callable[..., Any] = DEFAULT_METHOD,
    settings: FinetuneSettings | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    tuned: Process | None = None,
    conditions: Conditions | None = None,
    checkpoint: Checkpoint | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    tell: Tell = silent,
) -> TiltedModel:
    """Fine-tune ``base`` so that it samples p_base(x)·exp(strength · reward(x)), normalised.

    Args:
        base: The pretrained process; its weights are not touched.
        reward: ``(x (B, *event), **condition) -> (B,)``, differentiable unless the method needs values only.
        strength: λ ≥ 0; 0 returns an exact copy.
        method: A name of the table (``tiltflow list methods``), or a method class ``(chain, cost, …)`` of your own.
        settings: Budget and options; None: the defaults that suit the method, :meth:`FinetuneSettings.of`.
        seed: Of the initial weights and of every draw.
        device: Where to simulate and train.
        tuned: Process to train instead of a copy of the base; it must start at the base (:func:`tiltflow.tilted`).
        conditions: Draws condition rows for base, tuned process and reward, ``(n, generator) -> {name: (n, …)}``.
        checkpoint: File to save to while training.
        resume: Start from that file.
        callback: Called with each round's metrics; True makes it the last one.
        tell: Told what goes on before the first round: (what, done, total, note).

    Raises:
        TiltflowError: λ < 0, a schedule that is not memoryless, a reward or base of the wrong shape, detached or
            non-finite, a method that does not apply here, or diverging training.
    """
    check_value("seed", seed, Seed)
    row = row_of(method, "finetune")
    s = settings or FinetuneSettings.of(method)
    cost = RewardCost(reward, strength, s.max_cost_gradient)
    require_applies(row, base, s, conditions)
    require_memoryless(base.interpolant, s)
    generator = torch.Generator(device).manual_seed(seed)
    check_door(row, base, reward, torch.Generator(device).manual_seed(seed), conditions)
    if not row.trained or strength == 0:
        process = (tuned or tuned_process(base, trainable_copy(base))) if row.trained else base
        chain = training_chain(base, s, generator, conditions, tell)
        return TiltedModel(base, process, chain, cost, row, s, conditions, [])
    process = tuned or tuned_process(base, trainable_copy(base, s.rank, generator))
    if tuned is not None:
        require_start(base, tuned, torch.Generator(device).manual_seed(seed), conditions)
    chain = training_chain(base, s, generator, conditions, tell)
    trainer = made(row, chain, cost, s, generator, conditions)
    history = fit(trainer, State(FineTuned(process), generator), s, checkpoint, resume, callback)
    merge_low_rank(FineTuned(process).module)
    return TiltedModel(base, process, chain, cost, row, s, conditions, history)


def made(
    row: Row,
    chain: InterpolantChain,
    cost: RewardCost,
    s: FinetuneSettings,
    generator: torch.Generator,
    conditions: Conditions | None,
) -> Any:
    """The method of a row. Raises TiltflowError for a setting, or conditions, that it does not take."""
    return row.made(chain=chain, cost=cost, batch=s.batch, generator=generator, **options_of(s, conditions))


def options_of(s: FinetuneSettings, conditions: Conditions | None) -> dict[str, Any]:
    """What only some methods take."""
    return {"last_steps": s.last_steps, "random_steps": s.random_steps, "clip": s.clip, "conditions": conditions}


def require_applies(row: Row, base: Process, settings: FinetuneSettings, conditions: Conditions | None) -> None:
    """Raise TiltflowError, in one sentence, where a method does not apply to a base, a schedule or a setting."""
    row.require(**(options_of(settings, conditions) if row.trained else {}))
    if "vectors" in row.needs and (len(base.event_shape) != 1 or base.event_shape[0] > SMALL):
        raise TiltflowError(
            f"the method {row.name!r} is for vectors of at most {SMALL} entries; events here are {base.event_shape}."
        )
    if "interpolant" in row.needs and (settings.sigma is not None or settings.chi != 0):
        raise TiltflowError(f"the method {row.name!r} needs the memoryless schedule: leave out sigma and chi.")
    row.require_training(settings.buffer_rounds, settings.accumulate, settings.batch)


def require_start(base: Process, tuned: Process, generator: torch.Generator, conditions: Conditions | None) -> None:
    """Raise TiltflowError if the process to train does not start at the base: it would tilt another prior."""
    apart = starts_at_base(base, tuned, generator, conditions)
    if not apart <= APART:
        raise TiltflowError(
            f"tuned= does not start at the base: X̂_1 differs by {apart:.3g} of its size. Start from a copy of the base's "
            "weights, or give the last layer of a correction zeros (tiltflow.tilted)."
        )


def check_door(
    row: Row, base: Process, reward: Reward, generator: torch.Generator, conditions: Conditions | None, seen: bool = True
) -> None:
    """Base and reward, before anything is trained or written.

    Args:
        row: The method.
        base: What is fine-tuned.
        reward: What for.
        generator: Of the samples that both are tried on.
        conditions: Draws condition rows for the reward.
        seen: Whether the base sees the conditions too.

    Raises:
        TiltflowError: the first thing that is wrong with the base or with the reward; for a reward without gradient it names
            the methods that need its values only.
    """
    require_base(base, generator, conditions if seen else None)
    condition: dict[str, Any] = conditions(TRIAL, generator) if conditions else {}
    one = {name: v[:1].expand(TRIAL, *v.shape[1:]) for name, v in condition.items()}
    x = base.source(TRIAL, generator, torch.get_default_dtype(), generator.device)
    with torch.no_grad():
        x1 = base.x1(x, torch.full((TRIAL,), 0.5).to(x), **(one if seen else {}))
    others = ", ".join(names("finetune", without=("gradient",)))
    quick_check(reward, x1, generator, row.needs_gradient, f"or use a method that needs its values only: {others}", **one)
