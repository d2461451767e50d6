r"""Fine-tune a diffusers pipeline towards a reward of what it makes, on its own chain, into an adapter.

    import tiltflow as tf
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("folder")
    tilted = tf.finetune_pipeline(pipe, reward, ["a cat", "a dog"], strength=100.0)     # reward(images, texts) -> (n,)
    print(tilted.verdict({"sharp": sharpness}))
    tilted.save("lora")                                                                # pipe.load_lora_weights("lora")

By default Adjoint Matching; any other method of :mod:`tiltflow.methods.registry` that a pipeline's chain can carry goes
through the same door.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Seed, check_value
from tiltflow.methods.registry import Row, names, row_of
from tiltflow.pipelines.adapters import add_adapter, remove_adapter, train_all
from tiltflow.pipelines.chain import Adapted, PipelineChain, pipeline_chain
from tiltflow.pipelines.conditions import DrawnConditions
from tiltflow.pipelines.embeddings import Rows
from tiltflow.pipelines.encode import HOST, encode_prompts, encoders_on
from tiltflow.pipelines.families import device_of, family_of
from tiltflow.pipelines.memory import fitting_rows
from tiltflow.pipelines.model import TiltedPipeline
from tiltflow.pipelines.settings import CLIP, DEFAULT_METHOD, PipelineSettings, check_prompts
from tiltflow.rewards.combine import Score
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.distributed import least, share_of, world
from tiltflow.train.fit import fit
from tiltflow.train.method import State

LACKS = {
    "interpolant": "a chain over an interpolant, and that of a pipeline is its scheduler's",
    "vectors": "vectors of few entries, and a pipeline has latents",
    "prediction": "the end point that a state is heading for, which it cannot ask a pipeline for",
}
"""Needs of methods that a pipeline does not meet, and why."""
Callback = Callable[[dict[str, Any], TiltedPipeline], bool | None]


def finetune_pipeline(
    pipe: Any,
    reward: Score,
    prompts: Sequence[str],
    strength: float,
    method: str | Callable[..., Any] = DEFAULT_METHOD,
    settings: PipelineSettings | None = None,
    *,
    seed: int = 0,
    negative: str | None = None,
    rows: Rows | None = None,
    checkpoint: Checkpoint | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
) -> TiltedPipeline:
    """Train an adapter so that the pipeline samples p_base(x | prompt)·exp(strength · reward(decoded x, prompt)).

    Args:
        pipe: Of a supported family (:data:`~tiltflow.pipelines.families.FAMILIES`); all its weights are frozen, and the
            adapter is put on it.
        reward: ``(images or audio, texts) -> (n,)``, differentiable unless the method needs values only.
        prompts: Their texts.
        strength: λ ≥ 0; 0 trains nothing.
        method: A name of the table (``tiltflow list methods``), or a method class ``(chain, cost, …)`` of your own.
        settings: Budget and options; None: the defaults that suit the method, :meth:`PipelineSettings.of`.
        seed: Of the adapter and of every draw.
        negative: Text of the negative prompt; None: the pipeline's own.
        rows: The prompts already encoded, one more than there are, the negative one last; None: they are encoded here.
        checkpoint: File to save to while training.
        resume: Start from that file.
        callback: Called with each round's metrics and what there is so far; True makes it the last round.

    Raises:
        TiltflowError: λ < 0, an unknown pipeline or scheduler, a method that does not apply, a reward that is detached,
            non-finite or of the wrong shape, rows that are not one more than the prompts, diverging training. Whatever is
            raised, the pipeline is left as it was (a checkpoint stays).
    """
    check_value("seed", seed, Seed)
    row = row_of(method, "finetune")
    check_prompts(prompts)
    s, prompts = settings or PipelineSettings.of(method), list(prompts)
    require_applies(row, s)
    generator = torch.Generator(str(device_of(pipe))).manual_seed(seed)
    rows = encode_prompts(pipe, prompts, negative, family=family_of(pipe, s.arguments)) if rows is None else rows
    if any(len(value) != len(prompts) + 1 for value in rows.values()):
        counts = {name: len(value) for name, value in rows.items()}
        raise TiltflowError(f"{len(prompts)} prompts need {len(prompts) + 1} rows, the negative one last; got {counts}.")
    if not row.trained:
        tilted = untrained(pipe, rows, reward, prompts, negative, strength, row, s, None)
        try_reward(tilted, generator)
        return tilted
    network = train_all(pipe) if s.rank is None else add_adapter(pipe, s.rank, generator, s.targets)
    try:
        tilted = untrained(pipe, rows, reward, prompts, negative, strength, row, s, network)
        with encoders_on(pipe, HOST):
            return _train(tilted, generator, checkpoint, resume, callback)
    except BaseException:
        remove_adapter(pipe)
        raise


def untrained(
    pipe: Any,
    rows: Rows,
    reward: Score,
    prompts: Sequence[str],
    negative: str | None,
    strength: float,
    row: Row,
    s: PipelineSettings,
    network: nn.Module | None,
) -> TiltedPipeline:
    """The model around a network as it is (None: nothing is to be trained)."""
    family = family_of(pipe, s.arguments)
    chain = pipeline_chain(pipe, rows, s.steps, s.scale("adjoint" if row.trained else "rollout"), s.rows, family)
    control = None if network is None else Adapted(network, s.scale("rollout"))
    return TiltedPipeline(pipe, chain, control, reward, tuple(prompts), negative, strength, row, s, [])


def require_applies(row: Row, s: PipelineSettings) -> None:
    """Raise TiltflowError, in one sentence, where a method does not apply to pipelines, or to the settings."""
    for need in row.needs:
        if need in LACKS:
            raise TiltflowError(f"the method {row.name!r} does not apply to pipelines: it needs {LACKS[need]}.")
    if not row.trained:
        return
    if not row.takes("conditions"):
        raise TiltflowError(f"the method {row.name!r} does not apply to pipelines: it takes no conditions, such as prompts.")
    row.require_training(s.buffer_rounds, s.accumulate, s.batch)
    row.require(last_steps=s.last_steps, random_steps=s.random_steps)
    if s.offload and not row.takes("keep"):
        raise TiltflowError(f"the method {row.name!r} keeps its paths where they are drawn: leave offload out.")
    if not row.takes("rollout"):
        if s.clip not in (None, CLIP):
            raise TiltflowError(f"clip bounds a term of Adjoint Matching's loss; the method {row.name!r} has none.")
        if s.dropout and s.dropout_in == "control":
            raise TiltflowError(
                f"the method {row.name!r} trains on the paths of the control itself: with dropout, dropout_in must be paths."
            )
        if s.scale("rollout") != s.scale("control"):
            raise TiltflowError(
                f"the method {row.name!r} trains on the paths of the control itself: guidance_in must name both rollout and "
                "control, or neither."
            )
    if row.takes("group") and (s.per_prompt < 2 or s.batch % s.per_prompt):
        raise TiltflowError(
            f"the method {row.name!r} compares the paths of a prompt: per_prompt = {s.per_prompt} must be at least 2 "
            f"and divide batch = {s.batch}."
        )


def drawn_conditions(tilted: TiltedPipeline, per_prompt: int) -> DrawnConditions:
    """What draws the prompts of paths."""
    s = tilted.settings
    return DrawnConditions(len(tilted.prompts), per_prompt, s.dropout, s.dropout_in == "paths")


def fitted_control(network: nn.Module, s: PipelineSettings) -> Adapted:
    """The control that is fitted: relative to its own base where that is not the chain's."""
    dropped = s.dropout > 0 and s.dropout_in == "control"
    relative = dropped or s.scale("control") != s.scale("adjoint")
    return Adapted(network, s.scale("control"), "fitted" if dropped else "prompt", relative)


def try_reward(tilted: TiltedPipeline, generator: torch.Generator) -> None:
    """Ask the reward once about noise, as the method will. Raises TiltflowError as the cost does."""
    s, x = tilted.settings, tilted.chain.source(2, generator)
    condition = drawn_conditions(tilted, s.per_prompt)(2, generator)
    ask_once(tilted.row, tilted.cost, x, condition)


def ask_once(row: Row, cost: RewardCost, x: Tensor, condition: dict[str, Any]) -> None:
    """Ask for what the method will ask for. Raises TiltflowError that names methods which need the reward's values only."""
    if not row.needs_gradient:
        with torch.no_grad():
            cost.value(x, **condition)
        return
    try:
        cost.grad(x, **condition)
    except (TiltflowError, RuntimeError) as error:
        said = str(error)
        if "requires grad" in said:  # torch's words for a conversion to numpy
            said = f"the reward is not differentiable: {said}"
        elif "detached" not in said:
            raise
        others = ", ".join(names("finetune", without=("gradient", *LACKS)))
        raise TiltflowError(f"{said} Or use a method that needs its values only: {others}.") from error


def _train(
    tilted: TiltedPipeline,
    generator: torch.Generator,
    checkpoint: Checkpoint | Path | None,
    resume: bool,
    callback: Callback | None,
) -> TiltedPipeline:
    s, row, rollout = tilted.settings, tilted.row, tilted.control
    assert rollout is not None
    control = fitted_control(rollout.network, s)
    try_reward(tilted, generator)
    if tilted.strength == 0:
        return tilted
    if s.micro_batch == "fit":
        condition = drawn_conditions(tilted, 1)(1, generator)
        work = partial(_all_for_one_row, row, tilted.chain, control, tilted.cost, condition)
        fitting = s.even(least(fitting_rows(work, share_of(s.batch), generator.device)), share_of(s.batch))
        tilted = replace(tilted, chain=replace(tilted.chain, micro_batch=fitting))
    training, share = s, share_of(s.batch)
    rows = min(tilted.chain.micro_batch or share, share)
    if not row.compares and s.accumulate is None:  # of K steps' rows: memory must not grow with K
        training = replace(s, accumulate=rows * world().size)
    half = next(rollout.network.parameters()).dtype.itemsize < 4
    if half and (s.minibatch is not None or share % rows or (training.accumulate or share) % (rows * world().size)):
        control = replace(control, regrouped=True)
    told = None if callback is None else lambda now: callback(now, tilted)
    state = State(control, generator)
    history = fit(made(tilted, rollout, generator), state, training, checkpoint, resume, told)
    return replace(tilted, history=history)


def made(tilted: TiltedPipeline, rollout: Adapted, generator: torch.Generator) -> Any:
    """The method of a pipeline, given those of the settings that it takes."""
    row, s = tilted.row, tilted.settings
    grouped, matching = row.takes("group"), row.takes("rollout")
    options: dict[str, Any] = {"checkpointing": True}  # a step is evaluated again in the backward pass
    if matching:
        options["clip"] = None if s.clip is None else s.clip * tilted.strength**2
    if row.takes("last_steps"):
        options["last_steps"], options["random_steps"] = s.regressed()
    return row.made(
        chain=tilted.chain,
        cost=tilted.cost,
        batch=s.batch,
        generator=generator,
        conditions=drawn_conditions(tilted, 1 if grouped else s.per_prompt),
        group=s.per_prompt,
        rollout=rollout,
        reference=tilted.sampled if rollout.guidance != tilted.chain.guidance else None,
        keep=HOST if s.offload else None,
        micro_batch=tilted.chain.micro_batch,
        **options,
    )


def _all_for_one_row(
    row: Row, chain: PipelineChain, control: Adapted, cost: RewardCost, condition: dict[str, Tensor]
) -> None:
    """Every kind of work: the decoder and the reward; with gradients a step of the adjoint, and the loss."""
    x = chain.source(1, torch.Generator(condition["prompt"].device))
    ask_once(row, cost, x, condition)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(row.needs_gradient)
        mean = chain.base_mean(0, leaf, **condition)
        if row.needs_gradient:
            torch.autograd.grad(mean.sum(), leaf)
        control.mean(chain, 0, x, base_mean=mean.detach(), **condition).sum().backward()
    control.module.zero_grad(set_to_none=True)
