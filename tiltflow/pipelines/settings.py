"""Settings of fine-tuning a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, NonNegative, Positive, Range, Real, Seed, Share, Steps, Whole, settings
from tiltflow.methods.registry import row_of, settings_of
from tiltflow.train.settings import Training, check_regressed

DEFAULT_METHOD = "adjoint_matching_plain"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The projections of attention, in all families."""
CLIP = 1.6
"""Of the paper, in units of λ²."""
MANY_STEPS = 20
"""From so many steps on, half of them are regressed on by default."""
SUITED = {"gradient_steps": 1, "buffer_rounds": 1}
"""Of pipelines, whatever suits the method elsewhere: a round holds four latents a step and path."""
Place = Literal["rollout", "control", "adjoint"]
Samples = Annotated[int, Range(2, 1_000_000)]


@settings
class PipelineSettings(Training):
    """Settings of :func:`tiltflow.finetune_pipeline`.

    Args:
        batch: Paths per round.
        per_prompt: Paths of a round that share a prompt; methods that compare paths compare these.
        steps: Steps of the scheduler.
        rank: Rank of the adapter; none: all weights are trained, in a float32 copy beside the frozen network.
        targets: Layers that get an adapter, by the end of their name.
        last_steps: Regress on so many last steps; none: of 20 steps or more a quarter and a random quarter, as in the paper.
        random_steps: With last_steps: and on so many others, drawn anew in each round.
        guidance: Classifier-free guidance scale; 1: none.
        guidance_in: Where guidance stands.
        dropout: Share of paths without their prompt's text; the reward is given it all the same.
        dropout_in: Where it is left out: in the control that is fitted, or in its paths and their adjoints too.
        clip: Bound on a term of Adjoint Matching's loss, in units of λ²; none: no bound.
        max_cost_gradient: Bound on the norm of λ∇r of a sample; none: the gradient itself.
        call: An argument of the pipeline's own call, name=value: height=512, num_frames=33, guidance_scale=3.5 (of models
            that are told it).
        micro_batch: Rows that a network sees at a time, at most, with the same result; none: a batch; fit: what memory
            holds, measured.
        offload: Keep paths and adjoints in the host's memory.
    """

    rounds: Count = 100
    learning_rate: Positive = 1e-4
    warmup: Whole = 5
    checkpoint_every: Count = 10
    batch: Count = 32
    per_prompt: Count = 4
    steps: Steps = 40
    rank: Count | None = 16
    targets: tuple[str, ...] = TARGETS
    last_steps: Whole | None = None
    random_steps: Whole | None = None
    guidance: Real = 1.0
    guidance_in: tuple[Place, ...] = ("rollout", "control", "adjoint")
    dropout: Share = 0.0
    dropout_in: Literal["control", "paths"] = "control"
    clip: Positive | None = CLIP
    max_cost_gradient: Positive | None = None
    call: tuple[str, ...] = ()
    micro_batch: Count | Literal["fit"] | None = None
    offload: bool = False

    def validate(self) -> None:
        """Settings that exclude or need each other."""
        check_regressed(self.last_steps, self.random_steps, self.steps)
        if not self.targets:
            raise TiltflowError("targets names no layer: an adapter needs at least one.")
        if wrong := [said for said in self.call if not said.partition("=")[0].isidentifier() or "=" not in said]:
            raise TiltflowError(f"call must be name=value, such as height=512; got {wrong[0]!r}.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of ``call``: values as JSON, or else as text."""
        return {name: _value(text) for name, _, text in (said.partition("=") for said in self.call)}

    @property
    def rows(self) -> int:
        """The most rows that a network may see at a time, where they are not measured."""
        return self.even(self.micro_batch) if isinstance(self.micro_batch, int) else self.batch

    def even(self, most: int, batch: int | None = None) -> int:
        """``most`` rows, or up to half as many that cut the batch (or that of one process) into equal parts, if any do.

        In equal parts a row is in the same company whenever it is evaluated: on its path, for its adjoint and in the loss.
        """
        batch = batch or self.batch
        return next((rows for rows in range(min(most, batch), most // 2, -1) if batch % rows == 0), most)

    def scale(self, place: Place) -> float:
        """The guidance scale in a place."""
        return self.guidance if place in self.guidance_in else 1.0

    def regressed(self) -> tuple[int | None, int | None]:
        """(last, random) steps of the loss."""
        if self.last_steps is None:
            return (self.steps // 4, self.steps // 4) if self.steps >= MANY_STEPS else (None, None)
        return self.last_steps, self.random_steps or 0

    @classmethod
    def of(
        cls, method: str | Callable[..., Any] = DEFAULT_METHOD, suited: Mapping[str, Any] | None = None, **given: Any
    ) -> Self:
        """The settings for a method: what is ``given`` over what suits the pipeline over what suits the method."""
        return settings_of(cls, row_of(method, "finetune"), SUITED if suited is None else suited, given)


@settings
class PipelineConfig:
    """Everything a run depends on; the run folder's config.json.

    Args:
        pipeline: Folder (or hub name) of a diffusers pipeline.
        reward: The reward, module:function (images or audio, texts) → (n,).
        prompts: The texts.
        strength: λ ≥ 0; see check_pipeline_reward.
        judges: Held-out scores, as the reward.
        negative: Negative prompt; none: the pipeline's own.
        method: The method; see tiltflow list methods.
        samples: Samples to judge, before and after.
        monitor: Rounds between looks at the judges, which end a training that one of them loses by; 0: no looks.
        seed: Seed of every random number.
        device: Device of torch: cpu, cuda, cuda:1, mps, or auto for the fastest there is.
        dtype: Of the frozen weights; trained ones are float32.
        variant: Of the pipeline's files, such as fp16.
        single_file: A .safetensors checkpoint with the weights of the pipeline; its folder then only says of which parts.
        embeddings: Folder that keeps encoded prompts, for this run and later ones; none: they are kept in memory.
        settings: Of the training.
    """

    pipeline: str | None
    reward: str | None
    prompts: tuple[str, ...]
    strength: NonNegative = 1.0
    judges: tuple[str, ...] = ()
    negative: str | None = None
    method: str = DEFAULT_METHOD
    samples: Samples = 64
    monitor: Whole = 0
    seed: Seed = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    variant: str | None = None
    single_file: str | None = None
    embeddings: str | None = None
    settings: PipelineSettings = PipelineSettings()

    def validate(self) -> None:
        """Prompts, and judges that are asked for."""
        check_prompts(self.prompts)
        if self.monitor and not self.judges:
            raise TiltflowError(f"monitor = {self.monitor} asks the judges every {self.monitor} rounds: name a judge.")
        row_of(self.method, "finetune")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise TiltflowError unless there is a prompt, and every one is a text."""
    if isinstance(prompts, str) or not prompts:
        raise TiltflowError(f"prompts must be a list of texts with at least one, which may be empty; got {prompts!r}.")
    wrong = [i for i, text in enumerate(prompts) if not isinstance(text, str)]
    if wrong:
        raise TiltflowError(f"prompt {wrong[0] + 1} is not a text but {prompts[wrong[0]]!r:.40}.")
