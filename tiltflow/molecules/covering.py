"""Conformers that cover the minima of a molecule: what a search for conformers is for, where an ensemble is for weights.

    from tiltflow.molecules.covering import covering
    from tiltflow.molecules.molecule import molecule
    found = covering(molecule("CC(=O)Oc1ccccc1C(=O)O"), 50, seed=0)
    found.drawn, found.relaxed                                 # (50, N, 3) Å, the most useful first
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.generate import generate
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.rmsd import distinct, rmsd_matrix
from tiltflow.molecules.select import cover
from tiltflow.molecules.settings import ConformerSettings, TorsionalSettings
from tiltflow.molecules.templates import embed, relax
from tiltflow.molecules.torsions import dihedrals, place, rotatable_torsions

HOT, EXTRA, RADIUS = 8_000.0, 512, 1.0
"""K; draws beyond those asked for; Å."""
ROUNDS, BATCH, STEPS, STEPS_OF_MODEL = 40, 64, 50, 12


class Covering(NamedTuple):
    """Conformers (n, N, 3), in Å, as ``drawn`` and ``relaxed`` by MMFF94; rows an energy evaluated, without relaxation."""

    drawn: Tensor
    relaxed: Tensor
    energy_calls: int


def covering(
    molecule: Molecule,
    n: int,
    seed: int,
    model: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, said: None,
    device: str = "cpu",
) -> Covering:
    """Of n + 512 draws of a hot torsional sampler the n that best cover what all of them relax to, the most useful first.

    The sampler follows MMFF94 at 8,000 K, where it avoids clashes and little else, and turns amides and esters too. The
    torsions drawn are put on n embeddings of RDKit, each in turn, so that bond lengths and angles vary. All draws are
    relaxed. A conformer is as useful as the number of these minima within 1 Å of it as drawn, plus the number within 1 Å of
    it relaxed (:func:`~tiltflow.molecules.select.cover`). docs/lab-notes.md has the trials behind the settings.

    Args:
        model: file of ``tiltflow train-conformers`` to draw from; None: one is trained on this molecule.

    Raises:
        UnsupportedMolecule: MMFF94 does not take it. TiltflowError: no geometry, a model that does not fit.
    """
    sampler = TorsionalSettings(rounds=ROUNDS, batch=BATCH, draw_steps=STEPS if model is None else STEPS_OF_MODEL)
    settings = ConformerSettings(
        temperature=HOT, n=n + EXTRA, templates=8, conjugated=model is None, sampler=sampler, model=model
    )
    made = generate(molecule, settings, seed, progress, device)
    torsions = rotatable_torsions(molecule, conjugated=True)
    angles = dihedrals(made.positions[torch.isfinite(made.energy)], torsions.atoms)
    rigid = embed(molecule, n, seed)
    rows = torch.arange(max(n, len(angles)))  # of a rigid molecule there are fewer draws than conformers
    drawn = place(rigid[rows % len(rigid)], torsions, angles[rows % len(angles)])
    return chosen(molecule, drawn, n)._replace(energy_calls=int(made.provenance["energy_evaluations"]))


def chosen(molecule: Molecule, drawn: Tensor, n: int) -> Covering:
    """Of conformers (m, N, 3), wherever they come from, the n that best cover what all of them relax to."""
    relaxed = relax(molecule, drawn)
    to_minima = [rmsd_matrix(molecule, x, relaxed) for x in (drawn, relaxed)]
    rows = cover(torch.cat(to_minima, 1), n, RADIUS)
    return Covering(drawn[rows], relaxed[rows], 0)


def covering_ensemble(
    molecule: Molecule, settings: ConformerSettings, seed: int, progress: Callable[[int, int, str], None], device: str
) -> Ensemble:
    """:func:`covering`, relaxed, with MMFF94 energies and without weights: they were chosen, not drawn.

    Each minimum is there once, so they may be fewer than were asked for.
    """
    made = covering(molecule, settings.n, seed, settings.model, progress, device)
    energy = open_energy("mmff94", molecule)
    value = energy.energy_and_forces(made.relaxed)[0].double()
    said = {"coordinates": "all, relaxed by MMFF94", "energy_evaluations": str(made.energy_calls)}
    first = sorted(min(rows) for rows in distinct(molecule, made.relaxed, value))  # the most useful of each minimum
    return Ensemble(molecule, made.relaxed[first], value[first], energy.unit, None, HOT, HOT, said)
