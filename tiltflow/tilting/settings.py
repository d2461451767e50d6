"""Settings of fine-tuning towards a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, NonNegative, Positive, Range, Real, Seed, Steps, Whole, settings
from tiltflow.digits.settings import BASE, SUITED
from tiltflow.methods.registry import row_of, settings_of
from tiltflow.train.settings import Training, check_regressed

DEFAULT_METHOD = "adjoint_matching"
FEWEST = 100
"""Samples that are judged, at least."""
Samples = Annotated[int, Range(FEWEST, 10_000_000)]


@settings
class FinetuneSettings(Training):
    """Settings of :func:`tiltflow.finetune`; all of them are in a run folder's config.json.

    Args:
        batch: Paths per round.
        steps: Simulation steps of the training chain.
        rank: Rank of trained low-rank updates of the linear layers, merged at the end; none: all weights are trained.
        last_steps: Regress on so many last steps only; none: on all.
        random_steps: With last_steps: and on so many others, drawn anew in each round.
        clip: Bound on a term of the loss, or on the ratio of Flow-GRPO; none: no bound.
        max_cost_gradient: Bound on the norm of λ∇r of a sample; none: the gradient itself.
        noiseless_last: End paths with the noiseless prediction of the base; none: for images only.
        variance_samples: Base samples that the chain's residual variances are measured on.
        sigma: Constant noise instead of the memoryless one; biased, and refused without allow_biased.
        allow_biased: Accept a noise schedule that is not memoryless.
        chi: Added to the memoryless noise, σ² = 2η + χ; the result may then be sampled with that schedule only.
    """

    rounds: Count = 400
    tolerance: Positive | None = 0.005
    batch: Annotated[int, Range(2, 2**53)] = 128
    minibatch: Count | None = 1024
    learning_rate: Positive = 2e-3
    warmup: Whole = 5
    steps: Steps = 25
    rank: Count | None = None
    last_steps: Whole | None = None
    random_steps: Whole | None = None
    clip: Positive | None = None
    max_cost_gradient: Positive | None = None
    noiseless_last: bool | None = None
    variance_samples: Annotated[int, Range(2, 2**53)] = 512
    sigma: NonNegative | None = None
    allow_biased: bool = False
    chi: Real = 0.0

    def validate(self) -> None:
        """Settings that exclude or need each other."""
        check_regressed(self.last_steps, self.random_steps, self.steps)
        if self.sigma is not None and self.chi != 0:
            raise TiltflowError("sigma replaces the memoryless schedule that chi belongs to: leave one of them out.")

    @classmethod
    def of(
        cls, method: str | Callable[..., Any] = DEFAULT_METHOD, suited: Mapping[str, Any] | None = None, **given: Any
    ) -> Self:
        """The settings for a method: what is ``given`` over what suits the method over what suits the base."""
        return settings_of(cls, row_of(method, "finetune"), suited or {}, given)


@settings
class TiltConfig:
    """Everything a fine-tuning run depends on; the run folder's config.json.

    Args:
        base: The base, by name: digits, a file of tiltflow pretrain, a finished run, or module:function.
        reward: The reward, by name: thickness, digit-0 … digit-9, inpainting, or module:function (x) → (B,).
        strength: Strength λ ≥ 0 of the tilt; see tiltflow check-reward.
        judges: Held-out judges, module:function (x) → (B,).
        conditions: What draws conditions for base, reward and judges, module:function (n, generator) → {name: (n, …)}.
        predicts: Output of a foreign model: velocity, eps, x1 or score.
        interpolant: Path of a foreign model: linear, cosine or vp.
        shape: Shape of one sample of a foreign model.
        label: Class of a class-conditional digits base.
        guidance: Classifier-free guidance scale.
        method: The method; see tiltflow list methods.
        seed: Seed of every random number.
        device: Device of torch: cpu, cuda, cuda:1, mps, or auto for the fastest there is.
        reference_samples: Base samples that, weighted by e^{λr}, stand for the exact tilt.
        samples: Samples of the model that are judged.
        settings: Of the training.
    """

    base: str | None = BASE
    reward: str | None = "thickness"
    strength: NonNegative = 1.0
    judges: tuple[str, ...] = ()
    conditions: str | None = None
    predicts: Literal["velocity", "eps", "x1", "score"] | None = None
    interpolant: Literal["linear", "cosine", "vp"] = "linear"
    shape: tuple[int, ...] | None = None
    label: int | None = None
    guidance: Positive = 1.0
    method: str = DEFAULT_METHOD
    seed: Seed = 0
    device: str = "cpu"
    reference_samples: Samples = 20_000
    samples: Samples = 4_000
    settings: FinetuneSettings = FinetuneSettings()


def suited(base: str | None) -> Mapping[str, Any]:
    """Settings that suit a base, by its name, where they are not the defaults."""
    return SUITED if base == BASE else {}
