"""Conformers chosen to cover the minima."""

import csv
import json

import pytest
import torch

pytest.importorskip("rdkit")

from commands import tiltflow

from tiltflow.bench import conformers as bench_conformers
from tiltflow.molecules import covering as module
from tiltflow.molecules.covering import covering
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.rmsd import rmsd_matrix
from tiltflow.molecules.templates import embed, relax
from tiltflow.molecules.torsions import dihedrals, rotatable_torsions


@pytest.mark.slow
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


@pytest.mark.slow
def test_few_conformers_cover_the_minima(monkeypatch):
    """Six of hexane within .5 Å of most of the minima of RDKit's embeddings, both as drawn and relaxed; mean of three seeds.

    Chosen by draws alone or by relaxed ones alone it is .42 and .52, of the first six .39.
    """
    monkeypatch.setattr(module, "EXTRA", 128)
    monkeypatch.setattr(module, "RADIUS", 0.5)
    hexane = molecule("CCCCCC")
    minima = relax(hexane, embed(hexane, 120, 1))
    least = []
    for seed in (0, 1, 3):
        made = covering(hexane, 6, seed)
        assert torch.equal(relax(hexane, made.drawn), made.relaxed)
        least.append(min(float((rmsd_matrix(hexane, minima, x).amin(1) < 0.5).double().mean()) for x in made[:2]))
    assert sum(least) / 3 > 0.62, least


def test_what_a_choice_alone_is_worth(monkeypatch):
    """The baseline of the benchmark: random torsions, chosen by the same rule, are among those that were drawn."""
    monkeypatch.setattr(bench_conformers, "EXTRA", 16)
    hexane = molecule("CCCCCC")
    found = bench_conformers.rdkit_random_torsions_chosen(hexane, 4, 0)
    pool = bench_conformers.rdkit_random_torsions(hexane, 20, 0).positions
    assert torch.equal(found.positions, module.chosen(hexane, pool, 4).drawn) and found.energy_calls == 0
    assert all(any(torch.equal(x, y) for y in pool) for x in found.positions)


def test_the_command_writes_minima_without_weights(monkeypatch, tmp_path):
    """Energies are those of MMFF94's minima: below those of embeddings. "none" stands for weights and temperature."""
    monkeypatch.setattr(module, "EXTRA", 32)
    monkeypatch.setattr(module, "ROUNDS", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    done = tiltflow("conformers", "CCCCO", "--cover", "-n", 4, "--out", tmp_path, "--json")
    document = json.loads(done.stdout)
    (row,) = [r for r in document["rows"] if r["kind"] == "conformers"]
    assert done.returncode == 0 and document["verdict"] is None and row["ess"] is None and row["conformers"] == 4
    rows = list(csv.DictReader((tmp_path / "conformers.csv").open()))
    assert {(r["weight"], r["temperature"]) for r in rows} == {("none", "none")}
    butanol = molecule("CCCCO")
    embedded = open_energy("mmff94", butanol).energy_and_forces(embed(butanol, 20, 0))[0]
    assert max(float(r["energy"]) for r in rows) < float(embedded.min())
    assert "none: chosen to cover" in (tmp_path / "report.html").read_text(encoding="utf-8")
