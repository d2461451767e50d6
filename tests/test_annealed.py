"""All coordinates: populations are those of a long chain with RDKit's energy; what was not sampled is named; settings."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("rdkit")

import tiltflow as tf
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.annealed import anneal
from tiltflow.molecules.clusters import population_error
from tiltflow.molecules.labels import kappa, unsampled
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.settings import AnnealedSettings, ConformerSettings
from tiltflow.molecules.templates import embed
from tiltflow.molecules.torsions import dihedrals, rotatable_torsions

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "results" / "conformer-populations.json"
DIHEDRALS = {"pentane": [[0, 1, 2, 3], [1, 2, 3, 4]]}


def populations(ensemble, atoms):
    """Of each state, as benchmarks/conformer_populations.py counts them, with their standard errors."""
    bent = dihedrals(ensemble.positions, torch.tensor(atoms)).abs() < math.radians(120)
    state = (bent.long() * 2 ** torch.arange(len(atoms))).sum(1)
    every = [state == k for k in range(2 ** len(atoms))]
    weights = ensemble.weights
    return [(float(weights[s].sum()), population_error(s, weights, ensemble.group)) for s in every]


@pytest.mark.parametrize(
    ("name", "walkers"),
    [("butane", 256), *(pytest.param(n, 2048, marks=pytest.mark.slow) for n in
     ("butane", "dichloroethane", "pentane", "glycol", "ethanolamine"))],
)  # fmt: skip
def test_populations_are_those_of_a_long_chain_in_all_coordinates(name, walkers):
    row = next(r for r in json.loads(REFERENCE.read_text())["rows"] if r["molecule"] == name)
    made = tf.conformers(row["smiles"], n=walkers, temperature=row["kelvin"], seed=2)
    assert made.reliable and made.provenance["coordinates"] == "all" and len(made) > 0.99 * walkers
    found = populations(made, DIHEDRALS.get(name, [[0, 1, 2, 3]]))
    for (p, error), (exact, its) in zip(found, row["populations"].values()):
        assert abs(p - exact) < 3 * math.hypot(error, its, 0.003), (found, row["populations"])
        assert walkers < 2048 or abs(p - exact) < 0.03
        assert error < 0.06 * (256 / walkers) ** 0.25


class Springs:
    """Two atoms: E = (r − 1)²/2 · 100 in kcal/mol, whose Z and ⟨r⟩ are known."""

    name, unit, elements = "springs", "kcal/mol", None

    def energy_and_forces(self, x):
        d = x[:, 0] - x[:, 1]
        r = d.norm(dim=-1)
        pull = -100 * (r - 1)[:, None] * d / r[:, None]
        return 50 * (r - 1) ** 2, torch.stack([pull, -pull], 1)


def test_distances_have_their_exact_distribution():
    """∝ r² e^{−E/kT}: weights, moves and resampling, without a molecule."""
    starts = torch.tensor([[[0.0, 0, 0], [1.2, 0, 0]]], dtype=torch.float64).repeat(1000, 1, 1)
    torsions = rotatable_torsions(molecule("C"))
    settings = AnnealedSettings(hot=3000.0, hot_moves=20, leaps=8)
    made = anneal(Springs(), torsions, False, starts, 300.0, settings, torch.Generator().manual_seed(0))
    r = (made.positions[:, 0] - made.positions[:, 1]).norm(dim=-1)
    grid = torch.linspace(0.3, 2, 20_000, dtype=torch.float64)
    weight = grid**2 * torch.exp(-50 * (grid - 1) ** 2 * 4184 / 6.02214076e23 / (1.380649e-23 * 300))
    mean = float((grid * weight).sum() / weight.sum())
    spread = float(((grid - mean) ** 2 * weight).sum() / weight.sum()) ** 0.5
    w = made.log_weights.softmax(0)
    assert abs(float((w * r).sum()) - mean) < 4 * spread / 1000**0.5 and mean > 1.01
    assert abs(float((w * (r - mean) ** 2).sum()) ** 0.5 / spread - 1) < 0.1


def test_a_ring_that_was_not_sampled_is_named():
    """Each label switched off in turn: no hot moves to speak of."""
    settings = {"annealed": AnnealedSettings(hot=300.0, hot_moves=1, walkers=32, leaps=2)}
    made = tf.conformers("CC1CCCCC1", n=32, **settings)
    assert not made.reliable and "ring bond C2–C3" in made.unsampled and made.verdict().status == "cannot tell"
    assert {row["weight"] for row in made.records(made.clusters())} == {"cannot tell"}
    assert {row["population"] for row in made.records(made.clusters())} == {"cannot tell"}


def test_groups_that_differ_are_no_error():
    """One move at each temperature is too little for aspirin's 300 K."""
    poor = AnnealedSettings(hot_moves=2, kept=0.1, moves=1, last_moves=1, walkers=16, leaps=3)
    made = tf.conformers("CC(=O)Oc1ccccc1C(=O)O", n=16, annealed=poor)
    assert "of 8 groups" in made.unsampled and not made.reliable


@pytest.mark.parametrize(
    ("smiles", "said"), [("CCCC", "bond C2–C3"), ("CCN(C)C(C)C", "nitrogen N3"), ("CCC(=O)N(C)CC", "bond N5–C3")]
)
def test_labels_that_do_not_change_are_named(smiles, said):
    of = molecule(smiles)
    x, torsions = embed(of, 40, 0), rotatable_torsions(of, conjugated=True)
    mixed = torch.stack([x, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]])
    assert any(said in name for name in unsampled(of, torsions, torch.stack([x, x])))
    assert not unsampled(of, torsions, mixed)


def test_kappa_and_errors():
    a = torch.tensor([0, 0, 1, 1])
    assert kappa(a, a) == 1 and kappa(a, torch.tensor([0, 1, 0, 1])) == 0 and kappa(a * 0, a * 0) == 0
    weights, inside = torch.full((400,), 1 / 400, dtype=torch.float64), torch.arange(400) < 100
    assert math.isclose(population_error(inside, weights, None), (0.25 * 0.75 / 399) ** 0.5, rel_tol=1e-9)
    assert population_error(inside, weights, torch.arange(400) // 100) > 5 * population_error(inside, weights, None)


def test_coordinates_are_chosen_by_what_is_given():
    assert ConformerSettings().all_coordinates and not ConformerSettings(energy="gfn2").all_coordinates
    assert not ConformerSettings(conjugated=True).all_coordinates
    with pytest.raises(TiltflowError, match="leave out conjugated, templates"):
        ConformerSettings(coordinates="all", conjugated=True, templates=2)
    with pytest.raises(TiltflowError, match="in all coordinates only"):
        ConformerSettings(coordinates="torsions", annealed=AnnealedSettings(walkers=8))
