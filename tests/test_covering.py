"""Conformers chosen to cover the minima."""

import pytest
import torch

pytest.importorskip("rdkit")

from tiltflow.metrics.conformers import rmsd_matrix
from tiltflow.molecules import covering as module
from tiltflow.molecules.covering import covering
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.templates import embed, relax
from tiltflow.molecules.torsions import dihedrals, rotatable_torsions


def test_it_turns_amides_and_has_geometries_of_its_own(monkeypatch):
    """N-methylacetamide: both sides of the amide in the first two, where RDKit has one; bond lengths of its own."""
    monkeypatch.setattr(module, "EXTRA", 64)
    mol = molecule("CC(=O)NC")
    amide = rotatable_torsions(mol, conjugated=True).atoms
    made, embedded = covering(mol, 6, 0), embed(mol, 6, 0)
    assert made.drawn.shape == embedded.shape and made.energy_calls > 0
    trans = [(dihedrals(x, amide)[:, 0].abs() < torch.pi / 2).tolist() for x in (made.drawn[:2], embedded)]
    assert sorted(trans[0]) == [False, True] and all(trans[1])
    lengths, own = ((x[:, 0] - x[:, 1]).norm(dim=1) for x in (made.drawn, embedded))
    assert ((lengths[:, None] - own).abs().amin(1) < 1e-6).all() and len(lengths.round(decimals=6).unique()) > 1


def test_few_conformers_cover_the_minima(monkeypatch):
    """Hexane's minima, by RDKit: six conformers cover more of them than any six consecutive embeddings, drawn and relaxed.

    ``relaxed`` belongs to ``drawn``, row by row.
    """
    monkeypatch.setattr(module, "EXTRA", 128)
    monkeypatch.setattr(module, "RADIUS", 0.5)
    mol = molecule("CCCCCC")
    made, pool = covering(mol, 6, 0), embed(mol, 120, 1)
    assert (relax(mol, made.drawn) - made.relaxed).abs().max() < 1e-6
    minima = relax(mol, pool)

    def covered(x):
        return float((rmsd_matrix(mol, minima, x).amin(1) < 0.5).double().mean())

    others = [covered(pool[6 * k : 6 * k + 6]) for k in range(20)]
    assert covered(made.relaxed) > max(covered(relax(mol, pool[6 * k : 6 * k + 6])) for k in range(20)) - 0.05
    assert covered(made.drawn) >= sorted(others)[10]
