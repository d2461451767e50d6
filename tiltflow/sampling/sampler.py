"""Train a sampler of e^{−E} from the energy alone: the second job in one call.

    from tiltflow import EnergyProblem, train_sampler
    energy = lambda x: 8 * (x.norm(dim=1) - 2) ** 2
    problem = EnergyProblem(name="ring", energy=energy, event_shape=(2,), scale=3, finest=0.03)
    trained = train_sampler(problem)
    drawn = trained.draw(10_000)          # drawn.x, drawn.log_weights, drawn.energy
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tiltflow.core.brownian import BrownianChain, NoiseChain, OrnsteinUhlenbeckChain, constant_chain, geometric_chain
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus, noise
from tiltflow.core.simulate import sample
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.methods.backpropagation import discrete_adjoint
from tiltflow.methods.bridge_sampling import AdjointBridgeSampling, DampedBridgeMatching
from tiltflow.methods.idem import IteratedDenoising
from tiltflow.methods.log_variance import LogVariance
from tiltflow.nn.mlp import MLP, EventMLP
from tiltflow.nn.particles import ParticleNet
from tiltflow.train.buffer import Buffer
from tiltflow.train.fit import FitSettings, History, fit
from tiltflow.train.method import Method, State

METHODS = (
    "adjoint_sampling", "weighted_adjoint_sampling", "asbs", "bridge_matching", "pis", "dds", "log_variance", "idem",
)  # fmt: skip
ON_POLICY = ("pis", "dds", "log_variance")
"""Methods on whole paths: one gradient step per round, on that round."""
FROM_NOISE = ("asbs", "bridge_matching", "idem")
"""Methods that start from N(0, σ_max² I); their paths have no weights here."""
MATCHED = ("adjoint_sampling", "weighted_adjoint_sampling", "asbs", "bridge_matching")
"""Methods that learn their step variance."""


@dataclass(frozen=True)
class SamplerSettings:
    """How to train a sampler.

    Args:
        method: one of :data:`METHODS`.
        iterations: rounds of simulation and energy evaluation. batch: end points per round.
        updates, minibatch: gradient steps per round, and their rows. buffer_rounds: rounds kept.
        steps: simulation steps K in training. draw_steps: those of finished samples; the error of a step's variance falls as
            1/K, and path weights are exact for any.
        noise: "geometric", as in the paper, or "constant".
        scale, finest: σ_max and σ_min of the noise (None: the problem's).
        hidden, layers: of the network.
        learning_rate, gradient_clip, ema: see :class:`~tiltflow.train.fit.FitSettings`.
        max_grad_norm: bound on ‖∇E‖, of each particle, or of each sample for vectors.
        minimum_ess: path weights are tempered to this ESS fraction (methods that use them).
        hot, cooling: rounds start at temperature ``hot`` and cool geometrically to 1 over this share of them.
    """

    method: str = "weighted_adjoint_sampling"
    iterations: int = 200
    batch: int = 512
    updates: int = 100
    minibatch: int = 512
    buffer_rounds: int = 10
    steps: int = 50
    draw_steps: int = 200
    noise: Literal["geometric", "constant"] = "geometric"
    scale: float | None = None
    finest: float | None = None
    hidden: int = 64
    layers: int = 3
    learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    ema: float = 0.9
    max_grad_norm: float | None = 100.0
    minimum_ess: float = 0.3
    hot: float = 1.0
    cooling: float = 0.5

    def temperature(self, iteration: int) -> float:
        """T of a round."""
        left = max(0.0, 1 - iteration / max(self.cooling * self.iterations, 1e-9))
        return self.hot**left


class Drawn(NamedTuple):
    """Samples (n, *event), their energies (n,), and unnormalised log path weights (n,) or None: mean e^{log_weights} ≈ Z."""

    x: Tensor
    energy: Tensor
    log_weights: Tensor | None


@dataclass(frozen=True)
class TrainedSampler:
    """The learned control on the chain it is drawn with; ``energy`` counts every evaluation."""

    problem: EnergyProblem
    settings: SamplerSettings
    chain: NoiseChain
    control: DriftControl
    energy: Evaluator
    history: History

    def draw(self, n: int, seed: int = 0, batch: int = 2_000) -> Drawn:
        """n samples with path weights (where the source is a point, or the base stationary)."""
        return draw(self.chain, self.control, self.energy, n, torch.Generator().manual_seed(seed), batch)


@torch.no_grad()
def draw(
    chain: NoiseChain,
    control: DriftControl,
    energy: Evaluator,
    n: int,
    generator: torch.Generator,
    batch: int = 2_000,
    condition: Callable[[int], dict[str, Any]] = lambda rows: {},
) -> Drawn:
    """n samples of a control on a chain; ``condition`` gives it so many rows."""
    geometry = chain.geometry
    x, energies, log_w = [], [], []
    for start in range(0, n, batch):
        rows = min(batch, n - start)
        part = sample(chain, control, chain.source(rows, generator), generator, **condition(rows))
        x.append(geometry.wrap(part.x))
        energies.append(energy.value(x[-1]))
        log_w.append(part.log_ratio - energies[-1])
    points = torch.cat(x)
    weights = torch.cat(log_w) - geometry.log_normal(points, chain.end_variance) if chain.initial is None else None
    return Drawn(points, torch.cat(energies), weights)


def network(problem: EnergyProblem, settings: SamplerSettings) -> tuple[nn.Module, float]:
    """The problem's network and the number that divides its input."""
    scale, finest = _noise(problem, settings)
    if isinstance(problem.geometry, Centred) and problem.identical:
        particles, space = problem.event_shape
        net: nn.Module = ParticleNet(
            particles,
            space,
            settings.hidden,
            settings.layers,
            lengths=(0.4 * scale, 4 * scale),
            basis=24,
            noise=partial(noise_left, settings.noise, scale, finest),
        )
        return net, 1.0
    dim = math.prod(problem.event_shape)
    periodic = isinstance(problem.geometry, Torus)
    if periodic:
        return EventMLP(MLP(2 * dim, dim, settings.hidden, settings.layers), periodic=True), 1.0
    return EventMLP(MLP(dim, dim, settings.hidden, settings.layers)), scale


def noise_left(noise: str, scale: float, finest: float, t: Tensor) -> Tensor:
    """√(R_t + σ_min²): the standard deviation of the noise that is still to come."""
    return scale * (finest / scale) ** t if noise == "geometric" else (scale**2 * (1 - t) + finest**2).sqrt()


def _noise(problem: EnergyProblem, settings: SamplerSettings) -> tuple[float, float]:
    return settings.scale or problem.scale, settings.finest or problem.finest


def base_chain(problem: EnergyProblem, settings: SamplerSettings, steps: int) -> NoiseChain:
    """The method's base: Brownian from the point 0 or from N(0, σ_max² I), or Ornstein–Uhlenbeck."""
    scale, finest = _noise(problem, settings)

    def source(n: int, generator: torch.Generator) -> Tensor:
        return scale * noise(problem.geometry, torch.zeros(n, *problem.event_shape, device=generator.device), generator)

    if settings.method == "dds":
        return OrnsteinUhlenbeckChain(problem.geometry, problem.event_shape, steps, scale)
    initial = source if settings.method in FROM_NOISE else None
    if settings.noise == "constant":
        return constant_chain(problem.geometry, problem.event_shape, steps, scale, initial)
    return geometric_chain(problem.geometry, problem.event_shape, steps, scale, finest, initial)


def build(problem: EnergyProblem, s: SamplerSettings, energy: Evaluator, control: DriftControl) -> Method:
    """The method of the settings on its base."""
    chain = base_chain(problem, s, s.steps)
    cost = EnergyCost(energy, chain, s.max_grad_norm)
    if s.method in ("pis", "dds"):
        return discrete_adjoint(chain, cost, s.batch)
    if s.method == "log_variance":
        return LogVariance(chain, EnergyCost(energy, chain), s.batch)
    assert isinstance(chain, BrownianChain)
    if s.method == "adjoint_sampling":
        return AdjointSampling(chain, cost, s.batch, "adjoint", None, s.temperature)
    if s.method == "weighted_adjoint_sampling":
        return AdjointSampling(chain, cost, s.batch, "least_variance", s.minimum_ess, s.temperature)
    if s.method == "asbs":
        corrector, input_scale = network(problem, s)
        return AdjointBridgeSampling(chain, cost, corrector, s.batch, input_scale)
    if s.method == "bridge_matching":
        return DampedBridgeMatching(chain, cost, control, s.batch)
    return IteratedDenoising(chain, cost, control.finest, s.batch, max_score=s.max_grad_norm)


DEFAULTS: dict[str, SamplerSettings] = {
    "gmm40": SamplerSettings(iterations=120, batch=1024, minibatch=1024, steps=40, hidden=128),
    "dw4": SamplerSettings(
        iterations=400, minibatch=256, buffer_rounds=20, steps=60, draw_steps=400, finest=0.1, learning_rate=2e-3
    ),
    "lj13": SamplerSettings(
        iterations=140,
        updates=75,
        minibatch=256,
        buffer_rounds=20,
        steps=60,
        draw_steps=400,
        finest=0.03,
        layers=4,
        learning_rate=2e-3,
        minimum_ess=0.2,
    ),
    "lj55": SamplerSettings(
        iterations=100,
        batch=64,
        updates=60,
        minibatch=32,
        buffer_rounds=30,
        steps=40,
        draw_steps=100,
        finest=0.03,
        learning_rate=2e-3,
        minimum_ess=0.2,
    ),
}
"""Settings of named problems where they differ from the class's; chosen on seed 0, see docs/lab-notes.md."""

def train_sampler(
    problem: EnergyProblem,
    settings: SamplerSettings | None = None,
    *,
    energy: Evaluator | None = None,
    net: nn.Module | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> TrainedSampler:
    """Learn to sample e^{−E}/Z.

    Args:
        problem: the energy, its space, and the two lengths ``scale`` and ``finest``.
        settings: how. energy: the evaluator to use (None: a new one, with neither budget nor cache).
        net: a network (x (B, *event), t (B,)) → (B, *event) of your own, e.g. :class:`~tiltflow.nn.informed.Informed` around
            another; it sees x itself, and its output of order one is divided by √(R_t + σ_min²). None: the problem's.
        seed: of the weights and of every draw. checkpoint, resume, callback: see :func:`tiltflow.train.fit.fit`.

    Raises:
        TiltflowError: an unknown method or noise, an energy that fails (see :class:`~tiltflow.energies.Evaluator`), or
            divergence.
    """
    s = settings or SamplerSettings()
    if s.method not in METHODS:
        raise TiltflowError(f"unknown sampling method {s.method!r}; choose one of {', '.join(METHODS)}.")
    if s.noise not in ("geometric", "constant"):
        raise TiltflowError(f"unknown noise {s.noise!r}; choose geometric or constant.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, input_scale = network(problem, s) if net is None else (net, 1.0)
        if s.method in MATCHED:
            net = StepVariance(net, s.steps)
        control = DriftControl(net, _noise(problem, s)[1], input_scale)
        evaluator = energy or Evaluator(problem.energy)
        method = build(problem, s, evaluator, control)
    on_policy = s.method in ON_POLICY
    fit_settings = FitSettings(
        s.iterations,
        s.learning_rate,
        gradient_clip=s.gradient_clip,
        ema=s.ema,
        updates=1 if on_policy else s.updates,
        minibatch=None if on_policy else s.minibatch,
        checkpoint_every=10,
    )
    buffer = Buffer() if on_policy else Buffer(s.buffer_rounds * s.batch)
    state = State(control, torch.Generator().manual_seed(seed))
    history = fit(method, state, fit_settings, buffer, checkpoint, resume, callback)
    return TrainedSampler(problem, s, base_chain(problem, s, s.draw_steps), control, evaluator, history)
