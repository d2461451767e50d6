r"""The torsional sampler: Adjoint Sampling on the torus of rotatable bonds, for every template of a molecule at once.

The target of template j is e^{−E(x_j(θ))/kT} dθ on [−π, π)^D, and of the molecule their sum over j. With n_j draws from
template j, the weight of a draw is w/n_j, of its path weight

    w = e^{−E/kT} dP_base/dP_u(path) / p_1^base(θ),

whose mean estimates Z_j. Path weights are exact at any temperature, that of training or another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain, geometric_chain
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.device import double, seeded
from tiltflow.core.geometry import Torus
from tiltflow.energies import Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.energies.evaluator import differentiable
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.methods.several import SeveralAdjointSampling
from tiltflow.molecules.energies import MolecularEnergy, Reduced
from tiltflow.molecules.settings import TorsionalSettings
from tiltflow.molecules.torsions import Torsions, place
from tiltflow.nn.mlp import SystemMLP
from tiltflow.sampling.drawn import Drawn, draw
from tiltflow.train.fit import Callback, History, fit
from tiltflow.train.method import State


@dataclass(frozen=True)
class TorsionEnergy:
    """E(x(θ))/kT of angles (B, D), differentiable; a callable for an :class:`~tiltflow.energies.Evaluator`."""

    energy: Reduced
    template: Tensor
    torsions: Torsions

    def __call__(self, angles: Tensor) -> Tensor:
        return differentiable(self.energy, place(self.template, self.torsions, double(angles))).to(angles)


@dataclass(frozen=True)
class TorsionalSampler:
    """A trained sampler of one molecule with ``dim`` torsions; ``energies`` are those of the templates, above ``zero``."""

    settings: TorsionalSettings
    dim: int
    zero: float
    control: DriftControl
    energies: list[Evaluator]
    history: History

    @property
    def energy_calls(self) -> int:
        """Energies evaluated so far, rows."""
        return sum(e.evaluations for e in self.energies)

    def draw(self, counts: list[int], generator: torch.Generator) -> list[Drawn]:
        """So many angles of each template, with their path weights."""
        chain = torsion_chain(self.settings, self.dim, self.settings.draw_steps)
        systems = [partial(_rows_of_system, i, generator.device) for i in range(len(self.energies))]
        work = zip(counts, self.energies, systems)
        return [draw(chain, self.control, e, n, generator, condition=c) for n, e, c in work]


def _rows_of_system(system: int, device: torch.device, rows: int) -> dict[str, Tensor]:
    return {"system": torch.full((rows,), system, device=device)}


def torsion_chain(settings: TorsionalSettings, dim: int, steps: int) -> BrownianChain:
    """The base: Brownian motion on the torus from 0."""
    return geometric_chain(Torus(), (dim,), steps, settings.sigma_max, settings.sigma_min)


def torsion_energies(
    energy: MolecularEnergy, kelvin: float, templates: Tensor, torsions: Torsions
) -> tuple[float, list[Evaluator]]:
    """The first template's energy, in its unit, and energies in kT above it of each template (J, N, 3)."""
    zero = float(energy.energy_and_forces(templates[:1])[0])
    return zero, [Evaluator(TorsionEnergy(Reduced(energy, kelvin, zero), x, torsions)) for x in templates]


def target(energy: Evaluator, dim: int, settings: TorsionalSettings) -> AdjointSampling:
    """One target of :class:`~tiltflow.methods.several.SeveralAdjointSampling`."""
    chain = torsion_chain(settings, dim, settings.steps)
    cost = EnergyCost(energy, chain, settings.max_cost_gradient)
    return AdjointSampling(chain, cost, settings.batch, "least_variance", settings.minimum_ess)


def train_torsional(
    energy: MolecularEnergy,
    kelvin: float,
    templates: Tensor,
    torsions: Torsions,
    settings: TorsionalSettings | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    device: str = "cpu",
) -> TorsionalSampler:
    """Train a sampler of e^{−E/kT} over the torsions of J templates (J, N, 3), D ≥ 1 torsions, with its network on a device.

    Raises:
        TiltflowError: an energy that is not finite on most of the base's draws, or divergence.
    """
    dim = len(torsions.atoms)
    s = (settings or TorsionalSettings()).of(dim)
    zero, evaluators = torsion_energies(energy, kelvin, templates, torsions)
    samplers = [target(e, dim, s) for e in evaluators]
    with seeded(seed):
        net = SystemMLP(len(templates), dim, s.hidden, s.layers).to(device)
    control = DriftControl(StepVariance(net, s.steps), s.sigma_min)
    method = SeveralAdjointSampling(samplers, len(samplers))
    state = State(control, torch.Generator(device).manual_seed(seed))
    history = fit(method, state, s, callback=callback)
    return TorsionalSampler(s, dim, zero, control, evaluators, history)
