"""One torsional sampler for all molecules: trained on many at once from their energies, drawn from for ones it never saw.

    model = train_amortised(prepare(molecules, settings, seed=0), settings, seed=0)
    save_amortised(Path("model.safetensors"), model)
    tiltflow conformers molecules.smi --model model.safetensors --out run

Each round visits a few (molecule, template) pairs; end points, energies and path weights are those pairs' own, the network
and the buffer are shared (:mod:`tiltflow.methods.several`, :mod:`tiltflow.molecules.nn.torsion`). For a new molecule nothing
is trained: its samples carry exact path weights all the same, and their ESS says how far the network can be trusted on it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.device import seeded
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json, from_json
from tiltflow.methods.several import SeveralAdjointSampling
from tiltflow.molecules.energies import MolecularEnergy, UnsupportedMolecule, open_energy
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.nn.torsion import TorsionNet
from tiltflow.molecules.settings import AmortisedSettings, TorsionalSettings
from tiltflow.molecules.systems import systems
from tiltflow.molecules.templates import templates
from tiltflow.molecules.torsional import TorsionalSampler, target, torsion_energies
from tiltflow.molecules.torsions import Torsions, rotatable_torsions
from tiltflow.sampling.train import noise_left
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.distributed import share_of
from tiltflow.train.fit import Callback, History, fit
from tiltflow.train.method import State
from tiltflow.train.store import load_weights, save_weights

SHIPPED = Path(str(files("tiltflow.molecules") / "assets" / "torsions-spice.safetensors"))
"""A model that saw 168 molecules of SPICE; see its MODEL_CARD.md."""


class Prepared(NamedTuple):
    """A molecule with its energy, torsions and templates (J, N, 3)."""

    molecule: Molecule
    energy: MolecularEnergy
    torsions: Torsions
    templates: Tensor


class Amortised(NamedTuple):
    """The trained control, its settings, the SMILES it was trained on, and the history of training."""

    control: DriftControl
    settings: AmortisedSettings
    smiles: list[str]
    history: History

    def of(
        self, molecule: Molecule, energy: MolecularEnergy, torsions: Torsions, rigid: Tensor, kelvin: float, draw_steps: int
    ) -> TorsionalSampler:
        """The sampler of a molecule's templates (J, N, 3), as it is, with so many steps; weights are at ``kelvin``."""
        module = copy.deepcopy(self.control.module)
        assert isinstance(module, StepVariance) and isinstance(module.net, TorsionNet)
        module.net.systems = systems([(molecule, torsions, x) for x in rigid])
        zero, evaluators = torsion_energies(energy, kelvin, rigid, torsions)
        control = DriftControl(module, self.control.finest)
        settings = replace(self.settings.sampler, draw_steps=draw_steps)
        return TorsionalSampler(settings, len(torsions.atoms), zero, control, evaluators, [])


def prepare(
    molecules: Sequence[Molecule],
    settings: AmortisedSettings,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda done, total, said: None,
) -> list[Prepared]:
    """Energies and templates of those molecules that turn about a bond and that the energy takes.

    Raises:
        TiltflowError: none of them.
    """
    found = []
    for i, one in enumerate(molecules):
        torsions = rotatable_torsions(one, settings.conjugated)
        if len(torsions.atoms):
            try:
                energy = open_energy(settings.energy, one)
                rigid = templates(one, torsions, settings.templates, seed + i, embeddings=8).positions
                found.append(Prepared(one, energy, torsions, rigid))
            except UnsupportedMolecule:
                pass
        progress(i + 1, len(molecules), one.name)
    if not found:
        raise TiltflowError(f"none of {len(molecules)} molecules has a rotatable bond and is taken by {settings.energy}.")
    return found


def train_amortised(
    prepared: Sequence[Prepared],
    settings: AmortisedSettings,
    seed: int = 0,
    checkpoint: Checkpoint | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    device: str = "cpu",
) -> Amortised:
    """Train on all templates of all molecules, the network on a device; the rest as in :func:`~tiltflow.train.fit.fit`.

    Raises:
        TiltflowError: divergence, an energy that is not finite on most draws.
    """
    s = replace(settings.sampler, batch=share_of(settings.sampler.batch))
    samplers = []
    for one in prepared:
        _, evaluators = torsion_energies(one.energy, settings.kelvin, one.templates, one.torsions)
        samplers += [target(e, len(one.torsions.atoms), s) for e in evaluators]
    table = systems([(one.molecule, one.torsions, x) for one in prepared for x in one.templates])
    with seeded(seed):
        control = _control(TorsionNet(table, s.hidden, s.layers, noise=_noise(s)).to(device), s)
    method = SeveralAdjointSampling(samplers, min(settings.visited, len(samplers)))
    state = State(control, torch.Generator(device).manual_seed(seed))
    history = fit(method, state, s, checkpoint, resume, callback)
    return Amortised(control, settings, [one.molecule.smiles for one in prepared], history)


def _control(net: TorsionNet, s: TorsionalSettings) -> DriftControl:
    return DriftControl(StepVariance(net, s.steps), s.sigma_min)


def _noise(s: TorsionalSettings) -> Callable[[Tensor], Tensor]:
    return partial(noise_left, "geometric", s.sigma_max, s.sigma_min)


def save_amortised(path: Path, model: Amortised) -> None:
    """Weights, settings and training molecules in one safetensors file."""
    said = {"settings": json.dumps(as_json(model.settings)), "smiles": json.dumps(model.smiles)}
    save_weights(path, model.control.module, said)


def load_amortised(path: Path, device: str = "cpu") -> Amortised:
    """What :func:`save_amortised` wrote, on a device. Raises TiltflowError if it is no such file."""
    try:
        with safe_open(path, framework="pt") as f:
            said = f.metadata() or {}
        settings = from_json(AmortisedSettings, json.loads(said["settings"]), "its settings")
        smiles = json.loads(said["smiles"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TiltflowError(f"{path}: not a conformer model of `tiltflow train-conformers` ({error}).") from error
    s = settings.sampler
    control = _control(TorsionNet(None, s.hidden, s.layers, noise=_noise(s)).to(device), s)
    load_weights(path, control.module)
    return Amortised(control, settings, smiles, [])
