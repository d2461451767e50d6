r"""The Cartesian sampler: all atoms of one molecule, from a harmonic source to e^{−E/kT − U} by a Schrödinger bridge.

The source is that of springs on the bond graph,

    p_0(x) ∝ exp(−½ Σ_bonds 3‖x_i − x_j‖²/d°²),

of precision L ⊗ 1_3 with the graph's Laplacian L weighted by 3/d°². The graph is connected, so that the kernel of L is
(1, …, 1) alone: on the subspace with the centre of mass at zero L is not singular, and X_0 = Σ_k v_k ξ_k/√λ_k over its
other eigenvectors. From there ASBS (Liu et al. 2025, arXiv:2506.22565; :mod:`tiltflow.methods.bridge_sampling`) learns
the drift; U (:mod:`tiltflow.molecules.regular`) keeps bonds and stereo. With ``pretrain`` conformers of RDKit, each turned
to fit its X_0, bridge matching comes first. Samples are the learned sampler's, without path weights: dP*/dP_base depends on
X_0 too, by a factor that is not learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tiltflow.core.brownian import BrownianChain, geometric_chain
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.device import beside, seeded
from tiltflow.core.geometry import Centred
from tiltflow.energies import Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.bridge_sampling import AdjointBridgeSampling, BridgeMatching
from tiltflow.molecules.energies import MolecularEnergy, Reduced
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.nn.molecule import MoleculeNet
from tiltflow.molecules.regular import Regulariser, regulariser
from tiltflow.molecules.settings import CartesianSettings
from tiltflow.molecules.templates import embed
from tiltflow.sampling.drawn import Drawn, draw
from tiltflow.sampling.train import noise_left
from tiltflow.train.fit import Callback, History, fit
from tiltflow.train.method import Method, State

FROM_CONFORMERS = CartesianSettings(pretrain=100, pretrain_rounds=32, rounds=0, fine_rounds=6)
"""Mostly bridge matching: many rounds on energies lose what it learned (docs/lab-notes.md)."""


@dataclass(frozen=True)
class CartesianEnergy:
    """E/kT + U of positions (B, N, 3): a ForceProvider."""

    energy: Reduced
    regular: Regulariser

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(E/kT + U) (B,) and its negative gradient (B, N, 3), float64."""
        energy, forces = self.energy.energy_and_forces(x)
        with torch.enable_grad():
            at = x.detach().double().requires_grad_(True)
            extra = self.regular(at)
            (slope,) = torch.autograd.grad(extra.sum(), at)
        return energy + extra.detach(), forces - slope


@dataclass(frozen=True)
class CartesianSampler:
    """A trained sampler of one molecule; ``energy`` counts evaluations and is 0 at ``zero``, in the energy's unit."""

    settings: CartesianSettings
    zero: float
    chain: BrownianChain
    control: DriftControl
    energy: Evaluator
    history: History

    def draw(self, n: int, generator: torch.Generator) -> Drawn:
        """n samples (n, N, 3), as they come, with E/kT + U above ``zero``."""
        return draw(self.chain, self.control, self.energy, n, generator)


def harmonic_source(bonds: Tensor, lengths: Tensor, atoms: int) -> Callable[[int, torch.Generator], Tensor]:
    """Draws of p_0, (n, N, 3), mass centre at zero; bonds (M, 2) have the mean squares ``lengths``² (in rings less)."""
    weight = torch.zeros(atoms, atoms, dtype=torch.float64)
    weight[bonds[:, 0], bonds[:, 1]] = weight[bonds[:, 1], bonds[:, 0]] = 3 / lengths.double() ** 2
    value, vector = torch.linalg.eigh(torch.diag(weight.sum(1)) - weight)
    modes = vector[:, 1:] * value[1:].rsqrt()

    def source(n: int, generator: torch.Generator) -> Tensor:
        white = torch.randn(n, atoms - 1, 3, generator=generator, device=generator.device)
        return beside(modes, white).to(white) @ white

    return source


def aligned(x: Tensor, to: Tensor) -> Tensor:
    """Each x (B, N, 3), centred and turned to fit ``to`` (B, N, 3), centred. Kabsch, Acta Cryst. A 32, 922, 1976."""
    x = x - x.mean(1, keepdim=True)
    u, _, vt = torch.linalg.svd(x.transpose(1, 2) @ to)
    sign = torch.ones_like(u[:, 0])
    sign[:, 2] = torch.det(u @ vt).sign()
    return x @ (u * sign[:, None] @ vt)


def cartesian_chain(settings: CartesianSettings, regular: Regulariser, atoms: int, steps: int) -> BrownianChain:
    """The base: Brownian motion of centred atoms from the harmonic source."""
    source = harmonic_source(regular.bonds, regular.lengths, atoms)
    return geometric_chain(Centred(), (atoms, 3), steps, settings.sigma_max, settings.sigma_min, source)


def train_cartesian(
    energy: MolecularEnergy,
    kelvin: float,
    molecule: Molecule,
    settings: CartesianSettings | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    device: str = "cpu",
) -> CartesianSampler:
    """Train a sampler of e^{−E/kT − U} over all atoms of a molecule, with its network on a device.

    Raises:
        TiltflowError: RDKit cannot embed the molecule, an energy that is mostly not finite, or divergence.
    """
    s = settings or CartesianSettings()
    conformers = embed(molecule, max(s.pretrain, 1), seed, relaxed=True)
    reference, atoms = conformers[0], conformers.shape[1]
    zero = float(energy.energy_and_forces(reference[None])[0])
    regular = regulariser(molecule, reference)
    evaluator = Evaluator(CartesianEnergy(Reduced(energy, kelvin, zero), regular))
    noise = partial(noise_left, "geometric", s.sigma_max, s.sigma_min)
    with seeded(seed):
        net = MoleculeNet(molecule, reference, noise, s.hidden, s.layers).to(device)
        corrector = MoleculeNet(molecule, reference, noise, s.hidden // 2, 1)  # smooth, and of t = 1 only
    control = DriftControl(StepVariance(net, s.steps), s.sigma_min)
    chain = cartesian_chain(s, regular, atoms, s.steps)
    low, high = s.max_cost_gradient
    method = AdjointBridgeSampling(chain, EnergyCost(evaluator, chain, high), corrector, s.batch)
    coarse = replace(method, bound=lambda iteration: low * (high / low) ** (iteration / max(s.rounds - 1, 1)))
    fine = replace(method, target="least_variance")

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x0 = chain.source(n, generator)
        rows = torch.randint(len(conformers), (n,), generator=generator, device=generator.device)
        x1 = beside(conformers, x0)[rows].to(x0)
        return x0, aligned(x1, x0)

    generator = torch.Generator(device).manual_seed(seed)
    pretraining = replace(s, rounds=s.pretrain_rounds if s.pretrain else 0, buffer_rounds=1)
    refining = replace(s, rounds=s.fine_rounds, learning_rate=s.learning_rate * s.fine_rate)
    stages: list[tuple[Method, CartesianSettings]] = [
        (BridgeMatching(fine, pairs), pretraining),
        (coarse, s),
        (fine, refining),
    ]
    history: History = []
    for stage, how in stages:
        history += fit(stage, State(control, generator), how, callback=callback)
    return CartesianSampler(s, zero, cartesian_chain(s, regular, atoms, s.draw_steps), control, evaluator, history)
