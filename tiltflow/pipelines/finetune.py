r"""Fine-tune a diffusers pipeline towards a reward of what it makes: Adjoint Matching on its own chain, into an adapter.

    from diffusers import StableDiffusionPipeline
    from tiltflow.pipelines.finetune import PipelineSettings, finetune_pipeline
    pipe = StableDiffusionPipeline.from_pretrained("folder")
    tuned = finetune_pipeline(pipe, reward, ["a cat", "a dog"], strength=100.0)     # reward(images, texts) -> (n,)
    tuned.save("lora")                                                             # pipe.load_lora_weights("lora")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import sample, simulate
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.pipelines.adapters import TARGETS, add_adapter, remove_adapter, save_adapter, train_all, trains_all
from tiltflow.pipelines.chain import Adapted, DecodedReward, Guidance, PipelineChain, in_parts, pipeline_chain
from tiltflow.pipelines.families import Rows, encode_prompts
from tiltflow.pipelines.memory import fitting_rows
from tiltflow.pipelines.prompts import DrawnConditions
from tiltflow.rewards.combine import Score
from tiltflow.train.buffer import Buffer
from tiltflow.train.distributed import world
from tiltflow.train.fit import History, fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training
from tiltflow.verdict.check_reward import RewardReport, check_reward
from tiltflow.verdict.paired import Judged

OTHERS = 1_000_003
"""Added to the seed per process."""
MANY_STEPS = 20
"""From so many steps on, half of them are regressed on by default."""


@dataclass(frozen=True)
class PipelineSettings:
    """Settings of :func:`finetune_pipeline`.

    Args:
        rounds, batch: rounds, and paths per round. per_prompt: consecutive paths of one prompt.
        steps: of the scheduler. rank, targets: of the adapter; rank None trains all weights, beside a frozen copy.
        learning_rate: Adam's. gradient_steps, minibatch: gradient steps per round, and rows of each (None: all).
        buffer_rounds: rounds whose rows are drawn from.
        last_steps, random_steps: steps regressed on (None: of 20 steps or more a quarter and a quarter, as in the paper).
        guidance: classifier-free, and where it stands. dropout: share of paths without a prompt.
        importance: weight paths by their tempered path weights.
        clip: per-term bound of the loss, in units of λ² (paper: 1.6; None: none). max_cost_gradient: bound on ‖λ∇r‖.
        micro_batch: rows that a network sees at a time (:class:`~tiltflow.pipelines.chain.PipelineChain`). "fit": as
            many as memory has room for, after one row was run and measured.
        offload: keep paths, adjoints and the rows made of them in the host's memory: 4 latents a step and path.
        ema, gradient_clip, checkpoint_every: see :class:`tiltflow.train.settings.Training`.
    """

    rounds: int = 100
    batch: int = 32
    per_prompt: int = 4
    steps: int = 40
    rank: int | None = 16
    targets: tuple[str, ...] = TARGETS
    learning_rate: float = 1e-4
    gradient_steps: int = 1
    minibatch: int | None = None
    buffer_rounds: int = 1
    last_steps: int | None = None
    random_steps: int | None = None
    guidance: Guidance = field(default_factory=Guidance)
    dropout: float = 0.0
    importance: bool = False
    clip: float | None = 1.6
    max_cost_gradient: float | None = None
    micro_batch: int | Literal["fit"] | None = None
    offload: bool = False
    ema: float = 0.97
    gradient_clip: float = 1.0
    checkpoint_every: int = 10

    def regressed(self) -> tuple[int | None, int]:
        """(last, random) steps of the loss."""
        if self.last_steps is None and self.random_steps is None:
            return (self.steps // 4, self.steps // 4) if self.steps >= MANY_STEPS else (None, 0)
        return self.last_steps or 0, self.random_steps or 0


class TunedPipeline(NamedTuple):
    """The pipeline with its adapter on, the chain that it was trained on, its texts (the negative last), and the history."""

    pipe: Any
    chain: PipelineChain
    control: Adapted
    texts: list[str]
    history: History

    def save(self, folder: str | Path) -> Path:
        """The adapter, for stock diffusers: :func:`~tiltflow.pipelines.adapters.save_adapter`.

        Where all weights were trained, the pipeline with them. What is written is returned.
        """
        if trains_all(self.chain.network):
            self.pipe.save_pretrained(folder, safe_serialization=True)
            return Path(folder)
        return save_adapter(self.pipe, Path(folder))


def finetune_pipeline(
    pipe: Any,
    reward: Score,
    prompts: list[str],
    strength: float,
    settings: PipelineSettings | None = None,
    *,
    generator: torch.Generator | None = None,
    rows: Rows | None = None,
    negative: str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any], TunedPipeline], bool | None] | None = None,
) -> TunedPipeline:
    """Train an adapter so that the pipeline samples p_base(x | prompt)·exp(strength · reward(decoded x, prompt)).

    Args:
        pipe: of a supported family (:data:`~tiltflow.pipelines.families.FAMILIES`); all its weights are frozen.
        reward: differentiable, of what the pipeline makes and of the prompts' texts.
        rows: the prompts already encoded, one more than there are, the negative one last (None: they are encoded here).
        negative: text of the negative prompt (None: the pipeline's own).
        callback: called with each round's metrics and what there is so far; True makes it the last round.
        generator: on the pipeline's device (None: seed 0); the same seed gives the same adapter.
        checkpoint, resume: see :func:`tiltflow.train.fit.fit`.

    Raises:
        TiltflowError: λ < 0, an unknown pipeline or scheduler, a reward that is detached, non-finite or of the wrong shape,
            rows that are not one more than the prompts, diverging training. Whatever is raised, the pipeline is left as it
            was (a checkpoint stays).
    """
    s, generator = settings or PipelineSettings(), generator or torch.Generator(str(pipe.device)).manual_seed(0)
    rows = encode_prompts(pipe, prompts, negative) if rows is None else rows
    if any(len(value) != len(prompts) + 1 for value in rows.values()):
        counts = {name: len(value) for name, value in rows.items()}
        raise TiltflowError(f"{len(prompts)} prompts need {len(prompts) + 1} rows, the negative one last; got {counts}.")
    texts = [*prompts, negative or ""]
    network = train_all(pipe) if s.rank is None else add_adapter(pipe, s.rank, generator, s.targets)
    try:
        return _train(pipe, network, reward, rows, texts, strength, s, generator, checkpoint, resume, callback)
    except BaseException:
        remove_adapter(pipe)
        raise


def _train(
    pipe: Any,
    network: nn.Module,
    reward: Score,
    rows: Rows,
    texts: list[str],
    strength: float,
    s: PipelineSettings,
    generator: torch.Generator,
    checkpoint: Path | None,
    resume: bool,
    callback: Callable[[dict[str, Any], TunedPipeline], bool | None] | None,
) -> TunedPipeline:
    w = s.guidance
    if (rank := world().rank) > 0:  # the same adapter everywhere, paths of its own in each process
        generator.manual_seed(generator.initial_seed() + OTHERS * rank)
    micro = None if s.micro_batch == "fit" else s.micro_batch
    chain = pipeline_chain(pipe, rows, s.steps, w.scale if w.adjoint else 1.0, micro)
    control = Adapted(network, w.scale if w.control else 1.0, relative=w.control != w.adjoint)
    rollout = Adapted(network, w.scale if w.rollout else 1.0)
    cost = RewardCost(DecodedReward(chain, reward, texts), strength, s.max_cost_gradient)
    draw = DrawnConditions(len(texts) - 1, s.per_prompt, {"prompt": s.dropout})
    cost.grad(chain.source(2, generator), **draw(2, generator))  # fail before the work starts
    if s.micro_batch == "fit":
        one = draw(1, generator)
        micro = fitting_rows(lambda: _all_for_one_row(chain, control, cost, one), s.batch, generator.device)
        chain = replace(chain, micro_batch=micro)
        cost = replace(cost, reward=DecodedReward(chain, reward, texts))
    last, random = s.regressed()
    method = AdjointMatching(
        chain,
        cost,
        batch=s.batch,
        last_steps=last,
        random_steps=random,
        clip=None if s.clip is None or strength == 0 else s.clip * strength**2,
        importance=s.importance,
        conditions=draw,
        rollout=rollout,
        keep=torch.device("cpu") if s.offload else None,
    )
    per_round = s.batch * (len(chain.controlled) if last is None else last + random)
    training = Training(
        rounds=s.rounds,
        learning_rate=s.learning_rate,
        warmup=5,
        gradient_steps=s.gradient_steps,
        minibatch=s.minibatch,
        accumulate=micro or s.batch,  # of K steps' rows: memory must not grow with K
        gradient_clip=s.gradient_clip,
        ema=s.ema,
        checkpoint_every=s.checkpoint_every,
    )
    buffer = Buffer(s.buffer_rounds * per_round)
    tuned = TunedPipeline(pipe, chain, rollout, texts, [])
    told = None if callback is None else lambda row: callback(row, tuned)
    history = fit(method, State(control, generator), training, buffer, checkpoint, resume, told)
    return tuned._replace(history=history)


@torch.no_grad()
def check_pipeline_reward(
    pipe: Any,
    reward: Score,
    prompt: str,
    samples: int = 128,
    *,
    settings: PipelineSettings | None = None,
    generator: torch.Generator | None = None,
    rows: Rows | None = None,
    judge: Score | None = None,
) -> RewardReport:
    """:func:`tiltflow.check_reward` on latents of the pipeline itself, for one prompt: is the reward sound, and which λ?

    Args:
        samples: at least 100, of the chain that would be fine-tuned. settings: its steps, guidance and micro-batch count.
        rows: of the prompt and the negative one, if they are encoded already.

    Raises:
        TiltflowError: an unknown pipeline or scheduler, too few samples.
    """
    s, generator = settings or PipelineSettings(), generator or torch.Generator(str(pipe.device)).manual_seed(0)
    rows = encode_prompts(pipe, [prompt]) if rows is None else rows
    chain = pipeline_chain(pipe, rows, s.steps, s.guidance.scale, None if s.micro_batch == "fit" else s.micro_batch)
    number = torch.zeros(samples, dtype=torch.long)
    x = simulate(chain, None, chain.source(samples, generator), generator, prompt=number).x[-1]
    held_out = None if judge is None else DecodedReward(chain, judge, [prompt, ""])
    decoded = DecodedReward(chain, reward, [prompt, ""])
    return check_reward(chain, decoded, samples=x, generator=generator, judge=held_out, prompt=number)


def _all_for_one_row(chain: PipelineChain, control: Adapted, cost: RewardCost, condition: dict[str, Tensor]) -> None:
    """Every kind of work with gradients: the decoder and the reward, a step of the adjoint, the loss."""
    x = chain.source(1, torch.Generator(condition["prompt"].device))
    cost.grad(x, **condition)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        mean = chain.base_mean(0, leaf, **condition)
        torch.autograd.grad(mean.sum(), leaf)
        control.mean(chain, 0, x, base_mean=mean.detach(), **condition).sum().backward()
    control.module.zero_grad(set_to_none=True)


@torch.no_grad()
def judge_pipeline(
    tuned: TunedPipeline, scores: Mapping[str, Score], n: int, generator: torch.Generator, base: bool = False
) -> Judged:
    """n samples of the fine-tuned pipeline (``base``: of the base), over its prompts in turn, and their ``scores``.

    With the same seed, base and fine-tuned samples have the same noise, row by row. Diversity is the distance of pairs with
    the same prompt, or of all pairs if no two have the same.
    """
    chain = tuned.chain
    prompt = torch.arange(n) % (len(tuned.texts) - 1)
    x0 = chain.source(n, generator)
    control = replace(tuned.control, on=False) if base else tuned.control
    found = sample(chain, control, x0, generator, prompt=prompt)
    texts = [tuned.texts[i] for i in prompt.tolist()]
    decoded = in_parts(lambda x: chain.family.decode(chain.pipe, x), chain.micro_batch, found.x)
    values = {name: score(decoded, texts).detach().double().cpu() for name, score in scores.items()}
    groups = [decoded[prompt == i].flatten(1).double() for i in prompt.unique()]
    several = [group for group in groups if len(group) > 1] or [decoded.flatten(1).double()]
    distances = [pairwise_mean(group)[0] for group in several]
    return Judged(found.x, values, found.kl, sum(distances) / len(distances))
