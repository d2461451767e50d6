"""Train a sampler of e^{−E} from the energy alone: the second job in one call.

    from tiltflow import EnergyProblem, train_sampler
    energy = lambda x: 8 * (x.norm(dim=1) - 2) ** 2
    problem = EnergyProblem(name="ring", energy=energy, event_shape=(2,), scale=3, finest=0.03)
    sampler = train_sampler(problem)
    drawn = sampler.sample(10_000)          # drawn.x, drawn.log_weights, drawn.energy
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.brownian import NoiseChain, OrnsteinUhlenbeckChain, constant_chain, geometric_chain
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.device import seeded
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus, noise
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.registry import Row, row_of
from tiltflow.nn.mlp import MLP, EventMLP
from tiltflow.nn.particles import ParticleNet
from tiltflow.run.device import check_device
from tiltflow.sampling.model import Sampler
from tiltflow.sampling.settings import DEFAULT_METHOD, SamplerSettings
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.fit import Callback, fit
from tiltflow.train.method import Method, State


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
    return settings.sigma_max or problem.scale, settings.sigma_min or problem.finest


def base_chain(problem: EnergyProblem, row: Row, settings: SamplerSettings, steps: int) -> NoiseChain:
    """The method's base: Brownian from the point 0 or from N(0, σ_max² I), or Ornstein–Uhlenbeck."""
    scale, finest = _noise(problem, settings)

    def source(n: int, generator: torch.Generator) -> Tensor:
        return scale * noise(problem.geometry, torch.zeros(n, *problem.event_shape, device=generator.device), generator)

    if row.source == "stationary":
        return OrnsteinUhlenbeckChain(problem.geometry, problem.event_shape, steps, scale)
    initial = source if row.source == "noise" else None
    if settings.noise == "constant":
        return constant_chain(problem.geometry, problem.event_shape, steps, scale, initial)
    return geometric_chain(problem.geometry, problem.event_shape, steps, scale, finest, initial)


def build(problem: EnergyProblem, row: Row, s: SamplerSettings, energy: Evaluator, control: DriftControl) -> Method:
    """The method of a row on its base."""
    chain = base_chain(problem, row, s, s.steps)
    corrector, input_scale = network(problem, s)
    return row.made(
        chain=chain,
        cost=EnergyCost(energy, chain, s.max_cost_gradient),
        batch=s.batch,
        minimum_ess=s.minimum_ess,
        temperature=s.temperature,
        corrector=corrector,
        input_scale=input_scale,
        control=control,
        finest=control.finest,
        max_score=s.max_cost_gradient,
    )


def untrained(
    problem: EnergyProblem,
    row: Row,
    settings: SamplerSettings,
    seed: int = 0,
    energy: Evaluator | None = None,
    net: nn.Module | None = None,
    device: str = "cpu",
) -> tuple[Sampler, Method]:
    """The sampler with its initial weights on a device, and the method that trains it; no energy is evaluated."""
    with seeded(seed):
        net, input_scale = network(problem, settings) if net is None else (net, 1.0)
        if row.step_variance:
            net = StepVariance(net, settings.steps)
        control = DriftControl(net.to(device), _noise(problem, settings)[1], input_scale)
        evaluator = energy or Evaluator(problem.energy)
        method = build(problem, row, settings, evaluator, control)
    chain = base_chain(problem, row, settings, settings.draw_steps)
    return Sampler(problem, row.name, settings, chain, control, evaluator, []), method


def require_trained(method: str | Callable[..., Any]) -> Row:
    """The row of a method that trains a sampler. Raises TiltflowError for another."""
    row = row_of(method, "sample")
    if not row.trained:
        raise TiltflowError(f"the method {row.name!r} trains nothing: run tiltflow bench sampling --methods {row.name}.")
    return row


def train_sampler(
    problem: EnergyProblem,
    method: str | Callable[..., Method] = DEFAULT_METHOD,
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    energy: Evaluator | None = None,
    net: nn.Module | None = None,
    checkpoint: Checkpoint | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
) -> Sampler:
    """Learn to sample e^{−E}/Z.

    Args:
        problem: The energy, its space, and its two lengths ``scale`` and ``finest``.
        method: A name of the table (``tiltflow list methods``), or a method class of your own.
        settings: How to train; None: what suits the problem and the method.
        seed: Of the weights and of every draw.
        device: Where to simulate and train; the energy is given x there, or on the CPU if it is a ForceProvider.
        energy: The evaluator to use; None: a new one, with neither budget nor cache.
        net: A network (x (B, *event), t (B,)) → (B, *event) of your own, e.g. :class:`~tiltflow.nn.informed.Informed` around
            another; it sees x itself, and its output of order one is divided by √(R_t + σ_min²).
        checkpoint: File to save to while training.
        resume: Start from that file.
        callback: Called with each round's metrics; True makes it the last one.

    Raises:
        TiltflowError: an unknown method, an energy that fails (see :class:`~tiltflow.energies.Evaluator`), or divergence.
    """
    row, device = require_trained(method), check_device(device)
    s = settings or SamplerSettings.of(method, problem.settings)
    row.require_training(s.buffer_rounds, s.accumulate, s.batch)
    sampler, trainer = untrained(problem, row, s, seed, energy, net, device)
    state = State(sampler.control, torch.Generator(device).manual_seed(seed))
    sampler.history.extend(fit(trainer, state, s, checkpoint, resume, callback))
    return sampler
