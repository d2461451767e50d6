"""Conformers of one molecule with weights: annealed in all coordinates; or templates from RDKit, torsions from a sampler.

    from tiltflow.molecules.generate import generate
    from tiltflow.molecules.molecule import molecule
    from tiltflow.molecules.settings import ConformerSettings
    ensemble = generate(molecule("CC(=O)Oc1ccccc1C(=O)O"), ConformerSettings(), seed=0)
    ensemble.positions, ensemble.energy, ensemble.weights      # (n, N, 3) Å, (n,) kcal/mol, (n,)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess
from tiltflow.molecules.amortised import load_amortised
from tiltflow.molecules.annealed import anneal
from tiltflow.molecules.energies import MolecularEnergy, kt_per, open_energy
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.labels import has_states, puckers, unsampled
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.rmsd import distinct
from tiltflow.molecules.settings import MOST, ConformerSettings
from tiltflow.molecules.templates import embed, low_templates, templates
from tiltflow.molecules.torsional import train_torsional
from tiltflow.molecules.torsions import place, rotatable_torsions

ALL, EMBEDDED = "all", 64
"""Most embeddings that walkers start from."""
HOT = 2_000.0
"""K, above which no state is enumerated: what is drawn so hot is a start, not a population."""
COORDINATES = "torsions about rotatable bonds at fixed bond lengths, angles and rings"


def rescored(ensemble: Ensemble, old: MolecularEnergy, new: MolecularEnergy) -> Ensemble:
    """The same conformers weighted for another energy: log w' = log w + (E_old − E_new)/kT, with E_new as their energies.

    Exact where the samples of the old energy cover those of the new one, which the ESS must show. Rows that the new energy
    cannot evaluate have no weight.
    """
    value = new.energy_and_forces(ensemble.positions)[0].double()
    kelvin = ensemble.temperature
    if ensemble.log_weights is None:
        raise TiltflowError(f"{ensemble.molecule.name}: conformers without weights cannot be weighted for {new.name}.")
    change = ensemble.energy.double() * kt_per(old.unit, kelvin) - value * kt_per(new.unit, kelvin)
    log_w = ensemble.log_weights.double() + change
    finite = torch.isfinite(value)
    if not bool(finite.any()):
        raise TiltflowError(f"{ensemble.molecule.name}: {new.name} evaluates none of {len(value)} conformers.")
    log_w = torch.where(finite, log_w - log_w[finite].max(), -torch.inf)
    said = {**ensemble.provenance, "sampled_with": old.name}
    return replace(ensemble, energy=value, unit=new.unit, log_weights=log_w, provenance=said)


def generate(
    molecule: Molecule,
    settings: ConformerSettings,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda done, total, said: None,
    device: str = "cpu",
) -> Ensemble:
    """n conformers with their log weights at the settings' temperature; of torsions, of each template as its share.

    A molecule with one state, such as water or benzene, has one, unless all coordinates are asked for by name.

    Raises:
        UnsupportedMolecule: the energy does not take it. TiltflowError: no geometry, missing package, divergence.
    """
    energy = open_energy(settings.energy, molecule)
    if settings.rescore is not None:
        judge = open_energy(settings.rescore, molecule)
        return rescored(generate(molecule, replace(settings, rescore=None), seed, progress, device), energy, judge)
    several = has_states(molecule, rotatable_torsions(molecule, conjugated=True))
    if settings.all_coordinates and (several or settings.coordinates == ALL):
        return annealed_ensemble(molecule, energy, settings, seed, progress, device)
    model = None if settings.model is None else load_amortised(Path(settings.model), device)
    hot = settings.training_kelvin if model is None else model.settings.kelvin
    torsions = rotatable_torsions(molecule, settings.conjugated if model is None else model.settings.conjugated)
    most = min(settings.templates if len(torsions.atoms) else MOST, settings.n)
    if settings.kelvin < HOT:
        rigid, share, stuck = low_templates(molecule, torsions, most, seed, settings.kelvin)
    else:
        rigid, share, stuck = templates(molecule, torsions, most, seed)
    if not len(torsions.atoms):
        return replace(_rigid_ensemble(molecule, energy, settings, rigid), unsampled="; ".join(stuck))

    sampler, rounds = settings.sampler, settings.sampler.rounds_of(len(torsions.atoms))

    def report(row: dict[str, Any]) -> None:
        said = f"median energy {row['energy']:.1f} kT, ESS {row['ess']:.2f}"
        progress(row["iteration"] + 1, rounds, said)

    if model is None:
        trained = train_torsional(energy, hot, rigid, torsions, sampler, seed, report, device)
    else:
        trained = model.of(molecule, energy, torsions, rigid, hot, sampler.draw_steps)
    counts = allot(settings.n, share)
    drawn = trained.draw(counts, torch.Generator(device).manual_seed(seed))
    x = torch.cat([place(template, torsions, double(one.x)) for template, one in zip(rigid, drawn)])
    reduced = torch.cat([double(one.energy) for one in drawn])
    per_draw = [(one.log_weights - math.log(n)).cpu() for n, one in zip(counts, drawn) if one.log_weights is not None]
    log_w = torch.cat(per_draw).double() + reduced * (1 - hot / settings.kelvin)  # E/kT for that of training
    value = reduced / kt_per(energy.unit, hot) + trained.zero
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    said = {"coordinates": COORDINATES, "templates": str(len(rigid)), "energy_evaluations": str(trained.energy_calls)}
    return Ensemble(
        molecule, x[rows], value[rows], energy.unit, log_w[rows], settings.kelvin, hot, said, unsampled="; ".join(stuck)
    )


def annealed_ensemble(
    molecule: Molecule, energy: MolecularEnergy, settings: ConformerSettings, seed: int,
    progress: Callable[[int, int, str], None], device: str,
) -> Ensemble:  # fmt: skip
    """n walkers of :func:`~tiltflow.molecules.annealed.anneal`, as many of each group as of the others, or nearly."""
    s, torsions = settings.annealed, rotatable_torsions(molecule, conjugated=True)
    size = -(-max(settings.n, s.walkers) // s.groups)
    embedded = embed(molecule, min(size, EMBEDDED), seed)
    starts = embedded[torch.arange(size) % len(embedded)].repeat(s.groups, 1, 1)

    def report(kelvin: float) -> None:
        progress(0, 1, f"{kelvin:.0f} K")

    generator, rings = torch.Generator(device).manual_seed(seed), bool(puckers(molecule.mol))
    made = anneal(energy, torsions, rings, starts, settings.kelvin, s, generator, report)
    order = torch.rand(size, s.groups, generator=torch.Generator().manual_seed(seed)).argsort(0).T
    rows = (order + size * torch.arange(s.groups)[:, None]).T.flatten()[: settings.n]
    x, value, log_w, group = (t.cpu()[rows] for t in made[:4])
    said = {"coordinates": ALL, "temperatures": str(made.temperatures), "energy_evaluations": str(made.energy_calls)}
    names, effective = unsampled(molecule, torsions, made.hot.cpu()), s.groups * ess(made.log_weights)
    if effective < s.groups / 2:
        names.append(f"Z, whose weight lies on {effective:.1f} of {s.groups} groups")
    return Ensemble(
        molecule, x, value, energy.unit, log_w, settings.kelvin, settings.kelvin, said,
        group=group, unsampled="; ".join(names),
    )  # fmt: skip


def allot(n: int, share: Tensor) -> list[int]:
    """n split by shares (J,), at least one each: n ≥ J."""
    counts = (share * n).floor().clamp_min(1).long()
    while int(counts.sum()) > n:
        counts[counts.argmax()] -= 1
    counts[0] += n - int(counts.sum())
    return counts.tolist()


def _rigid_ensemble(molecule: Molecule, energy: MolecularEnergy, settings: ConformerSettings, x: Tensor) -> Ensemble:
    """Without rotatable bonds the templates are the states: weights e^{−E/kT}, summed where several are one geometry."""
    value = energy.energy_and_forces(x)[0].double()
    log_w = -(value - value.min()) * kt_per(energy.unit, settings.kelvin)
    said = {"coordinates": "templates of a rigid molecule", "templates": str(len(x)), "energy_evaluations": str(len(x))}
    alike = distinct(molecule, x, value * (kt_per(energy.unit, 300.0) / kt_per("kcal/mol", 300.0)))
    log_w = torch.stack([log_w[rows].logsumexp(0) for rows in alike])
    first = [rows[0] for rows in alike]
    x, value = x[first], value[first]
    return Ensemble(molecule, x, value, energy.unit, log_w, settings.kelvin, settings.kelvin, said)
