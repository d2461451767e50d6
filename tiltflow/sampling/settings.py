"""Settings of training a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, Positive, Range, Seed, Share, Steps, Whole, settings
from tiltflow.methods.registry import row_of, settings_of
from tiltflow.train.settings import Decay, Training

DEFAULT_METHOD = "weighted_adjoint_sampling"
EVIDENCE = 2_000_000
"""Energies for an independent classical run at most."""
Samples = Annotated[int, Range(2, 10_000_000)]


@settings
class SamplerSettings(Training):
    """Settings of :func:`tiltflow.train_sampler`.

    Args:
        batch: End points per round.
        steps: Simulation steps in training.
        draw_steps: Simulation steps of finished samples; the error of a step's variance falls as 1/K.
        noise: Noise schedule of the base, geometric as in the paper or constant.
        sigma_max: Largest noise; none: the problem's scale.
        sigma_min: Smallest noise; none: the problem's finest detail.
        hidden: Width of the network.
        layers: Depth of the network.
        max_cost_gradient: Bound on ‖∇E‖ of each particle, or of each sample for vectors; none: no bound.
        minimum_ess: Path weights are tempered to this share of effective samples.
        hot: Temperature of the first rounds.
        cooling: Share of the rounds over which the temperature falls geometrically to 1.
    """

    gradient_steps: Count = 100
    minibatch: Count | None = 512
    buffer_rounds: Count = 10
    ema: Decay = 0.9
    checkpoint_every: Count = 10
    batch: Annotated[int, Range(2, 2**53)] = 512
    steps: Steps = 50
    draw_steps: Steps = 200
    noise: Literal["geometric", "constant"] = "geometric"
    sigma_max: Positive | None = None
    sigma_min: Positive | None = None
    hidden: Count = 64
    layers: Count = 3
    max_cost_gradient: Positive | None = 100.0
    minimum_ess: Annotated[float, Range(0, 1 - 1e-9, above=True)] = 0.3
    hot: Annotated[float, Range(1)] = 1.0
    cooling: Share = 0.5

    def validate(self) -> None:
        """σ_min < σ_max."""
        if self.sigma_max is not None and self.sigma_min is not None and not self.sigma_min < self.sigma_max:
            raise TiltflowError(f"sigma_min must be below sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}.")

    def temperature(self, iteration: int) -> float:
        """T of a round."""
        left = max(0.0, 1 - iteration / max(self.cooling * self.rounds, 1e-9))
        return self.hot**left

    @classmethod
    def of(
        cls, method: str | Callable[..., Any] = DEFAULT_METHOD, suited: Mapping[str, Any] | None = None, **given: Any
    ) -> Self:
        """The settings for a method: what is ``given`` over what suits the method over what suits the problem."""
        return settings_of(cls, row_of(method, "sample"), suited or {}, given)


@settings
class AutomaticSettings:
    """Settings of :func:`tiltflow.sample`.

    Args:
        islands: Populations that are annealed apart; they say how far log Z is to be trusted.
        particles: Draws of each.
        moves: Moves of MALA at each temperature, and of the samples at the end.
        draws: Draws of each round that adapts a mixture.
        rounds: Such rounds at most.
        least_ess: Share of effective draws below which the annealed population is the answer.
    """

    islands: Annotated[int, Range(2, 10_000)] = 8
    particles: Annotated[int, Range(16, 10_000_000)] = 256
    moves: Count = 10
    draws: Annotated[int, Range(100, 10_000_000)] = 10_000
    rounds: Count = 10
    least_ess: Share = 0.02


@settings
class EnergyConfig:
    """An energy, and how many samples of it are judged.

    Args:
        problem: The energy, by name: gmm40, dw4, …, or module:function.
        shape: Shape of one x of a plain energy.
        space: State space of a plain energy: vectors, particles or torus.
        scale: Spread of the target of a plain energy.
        finest: Its finest detail.
        seed: Seed of every random number.
        device: Device of torch: cpu, cuda, cuda:1, mps, or auto for the fastest there is.
        samples: Samples that are drawn from the result.
        compared: Of them those that distances to the reference are computed on.
        evidence: Energies at most for an independent classical run, where there is no reference; 0: none.
    """

    problem: str | None
    shape: tuple[int, ...] | None = None
    space: Literal["vectors", "particles", "torus"] = "vectors"
    scale: Positive | None = None
    finest: Positive | None = None
    seed: Seed = 0
    device: str = "cpu"
    samples: Samples = 10_000
    compared: Samples = 2_000
    evidence: Whole = EVIDENCE


@settings
class SamplerConfig(EnergyConfig):
    """Everything a sampler run depends on; the run folder's config.json.

    Args:
        method: The method; see tiltflow list methods.
        ray: Address of a Ray cluster that evaluates the energy, or local; none: this process.
        settings: Of the training.
    """

    method: str = DEFAULT_METHOD
    ray: str | None = None
    settings: SamplerSettings = SamplerSettings()


@settings
class AutomaticConfig(EnergyConfig):
    """Everything that sampling an energy depends on; the run folder's config.json.

    Args:
        settings: Of the stages.
    """

    settings: AutomaticSettings = AutomaticSettings()
