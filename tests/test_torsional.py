"""The torsional sampler against quadrature on the grid of torsions, and the coordinates against RDKit's own."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("rdkit")

from rdkit.Chem import rdMolTransforms

from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.weights import evidence, normalised
from tiltflow.energies import Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.methods.several import SeveralAdjointSampling
from tiltflow.molecules.energies import kt_per, open_energy
from tiltflow.molecules.generate import allot, generate, rescored
from tiltflow.molecules.molecule import molecule, with_positions
from tiltflow.molecules.settings import ConformerSettings, TorsionalSettings
from tiltflow.molecules.templates import embed, templates
from tiltflow.molecules.torsional import torsion_chain, train_torsional
from tiltflow.molecules.torsions import dihedrals, place, rotatable_torsions
from tiltflow.nn.mlp import SystemMLP
from tiltflow.sampling.drawn import draw
from tiltflow.train.fit import fit
from tiltflow.train.method import State

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "OCC(N)C(=O)NCc1ccccc1C", "C#CCOc1ccccc1", "F/C=C/C[C@H](O)CS"]


@pytest.mark.parametrize("smiles", SMILES)
def test_placing_is_setting_dihedrals(smiles, generator):
    """x(θ) has the distances of RDKit's SetDihedral, the angles asked for, and its gradient in θ is the torque."""
    mol = molecule(smiles)
    torsions = rotatable_torsions(mol)
    template = embed(mol, 1, 0)[0]
    angles = 2 * math.pi * torch.rand(16, len(torsions.atoms), generator=generator, dtype=torch.float64) - math.pi
    x = place(template, torsions, angles)
    torch.testing.assert_close(dihedrals(x, torsions.atoms), angles)
    theirs = with_positions(mol.mol, template[None]).GetConformer()
    for atoms, angle in zip(torsions.atoms.tolist(), angles[0].tolist()):
        rdMolTransforms.SetDihedralRad(theirs, *atoms, angle)
    y = torch.from_numpy(theirs.GetPositions())
    torch.testing.assert_close(torch.cdist(x[0], x[0]), torch.cdist(y, y), atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(lambda a: place(template, torsions, a), angles[:2].requires_grad_())
    mirrored = place(template * torch.tensor([1.0, 1.0, -1.0]), torsions, angles)
    assert not torch.allclose(torch.cdist(mirrored[0], mirrored[0]), torch.cdist(x[0].detach(), x[0].detach()), atol=1e-2)


def test_which_bonds_turn():
    """No ring, multiple, terminal or amide bond; hydroxyls that are no acid's. The smaller side moves, the axis does not."""
    expected = {
        "CCCCO": 3, "CCCC": 1, "CC(=O)O": 0, "c1ccccc1O": 1, "CCS": 1, "CCNC(=O)CC": 2, "CC#CC": 0, "CC=CC": 0,
        "CC(=O)OCC": 1, "c1ccccc1-c1ccccc1": 1, "C1CCCCC1CC": 1,
    }  # fmt: skip
    for smiles, count in expected.items():
        torsions = rotatable_torsions(molecule(smiles))
        assert len(torsions.atoms) == count, smiles
        for atoms, moving in zip(torsions.atoms.tolist(), torsions.moving):
            assert moving[atoms[3]] and not moving[atoms[:3]].any() and 2 * int(moving.sum()) <= len(moving)


def quadrature(energy, dim, points):
    """Grid (G, D), log Z and probabilities of e^{−E} on the torus."""
    line = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * math.pi - math.pi
    grid = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    e = torch.cat([energy(part) for part in grid.split(4096)]).double()
    return grid, float(torch.logsumexp(-e, 0)) + dim * math.log(2 * math.pi / points), torch.softmax(-e, 0)


def histogram(angles, weights, bins=18):
    """Shares of angles (n,) in bins of the circle."""
    place_of = ((angles.double() + math.pi) / (2 * math.pi) * bins).long().clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64).index_add(0, place_of, weights.double())


def worst_tv(angles, weights, grid, exact):
    """The largest total variation of a torsion's histogram."""
    apart = [histogram(angles[:, k], weights) - histogram(grid[:, k], exact) for k in range(grid.shape[1])]
    return max(float(one.abs().sum()) / 2 for one in apart)


QUICK = TorsionalSettings(rounds=16, gradient_steps=25, minibatch=256)


@pytest.mark.parametrize(
    "smiles, seed, settings",
    [("OCc1ccccc1", 1, QUICK), *[pytest.param("OCCc1ccccc1", s, None, marks=pytest.mark.slow) for s in range(3)]],
)
def test_weighted_conformers_match_quadrature(smiles, seed, settings):
    """Torsion TV ≤ .05 and |log Z error| ≤ .05 kT at 300 K; the same samples without their weights, or at 600 K, fail."""
    mol = molecule(smiles)
    torsions = rotatable_torsions(mol)
    dim = len(torsions.atoms)
    rigid = templates(mol, torsions, 1, seed).positions
    trained = train_torsional(open_energy("mmff94", mol), 300.0, rigid, torsions, settings, seed)
    (drawn,) = trained.draw([8_000], torch.Generator().manual_seed(seed))
    grid, log_z, exact = quadrature(trained.energies[0].energy, dim, 90 if dim < 3 else 36)
    found = evidence(drawn.log_weights)
    weights = normalised(drawn.log_weights)
    assert abs(found.log_z - log_z) < 0.05 and found.ess > 0.1
    assert worst_tv(drawn.x, weights, grid, exact) < 0.05
    energy = float((weights * drawn.energy.double()).sum())
    exact_energy = float((exact * trained.energies[0].energy(grid)).sum())
    assert abs(energy - exact_energy) < 0.1
    hot = torch.softmax(-0.5 * trained.energies[0].energy(grid), 0)
    assert worst_tv(drawn.x, weights, grid, hot) > 0.1


def told(j, rows):
    return {"system": torch.full((rows,), j)}


def test_templates_are_weighted_by_their_partition_functions():
    """Two templates of different energy: the share of each is Z_j/Z, the control told which one it is at."""
    targets = [(0.0, 2.0), (1.5, -4.0)]  # E_j = c_j − a_j cos θ

    def energy_of(c, a):
        return lambda x: c - a * x[:, 0].cos()

    settings = TorsionalSettings(rounds=15, gradient_steps=20, batch=128, minibatch=256, steps=15)
    chain = torsion_chain(settings, 1, settings.steps)
    evaluators = [Evaluator(energy_of(*target)) for target in targets]
    samplers = [AdjointSampling(chain, EnergyCost(e, chain), settings.batch, "least_variance", 0.2) for e in evaluators]
    torch.manual_seed(0)
    control = DriftControl(StepVariance(SystemMLP(2, 1, 32, 2), settings.steps), settings.sigma_min)
    state = State(control, torch.Generator().manual_seed(0))
    method = SeveralAdjointSampling(samplers, 2)
    fit(method, state, replace(settings, ema=0.5, buffer_rounds=4))
    for i, (c, a) in enumerate(targets):
        rows, other = (
            draw(chain, control, evaluators[i], 4000, state.generator, condition=partial(told, j)) for j in (i, 1 - i)
        )
        exact = math.log(2 * math.pi) + float(torch.special.i0(torch.tensor(abs(a))).log()) - c
        found = evidence(rows.log_weights)
        assert abs(found.log_z - exact) < 4 * found.log_z_error + 0.01
        assert found.ess > 0.7
        assert evidence(other.log_weights).ess < found.ess - 0.1  # told the wrong one, it samples the wrong one


def test_targets_of_different_sizes_share_a_round():
    """Rows are padded; what is padded has no loss, and the gradient of one target's rows does not depend on the padding."""
    settings = TorsionalSettings(batch=16, steps=5)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t, system):
            return self.slope * x.sin()

    samplers = []
    for dim in (1, 3):
        chain = torsion_chain(settings, dim, settings.steps)
        cost = EnergyCost(Evaluator(lambda x: -x.cos().sum(1)), chain)
        samplers.append(AdjointSampling(chain, cost, 16, "least_variance", 0.2))
    control = DriftControl(Net(), settings.sigma_min)
    method = SeveralAdjointSampling(samplers, 2)
    material = method.collect(State(control, torch.Generator().manual_seed(0))).material
    assert material["x1"].shape == (32, 3)
    small = {name: v[material["condition.system"] == 0] for name, v in material.items()}
    assert (small["x1"][:, 1:] == 0).all()
    loss = method.loss(control, small, torch.Generator().manual_seed(1))
    padding = torch.tensor([0.0, 1.0, 1.0])
    changed = small | {name: small[name] + 5 * padding for name in ("x1", "grad")}
    torch.testing.assert_close(method.loss(control, changed, torch.Generator().manual_seed(1)), loss)


def test_generate_weights_at_another_temperature():
    """Trained at 600 K, weighted at 300 K: the mean energy is that of quadrature at 300 K, not at 600 K."""
    mol = molecule("OCc1ccccc1")
    sampler = TorsionalSettings(rounds=12, gradient_steps=20, minibatch=256)
    settings = ConformerSettings(temperature=300.0, sampling_temperature=600.0, n=3000, templates=1, sampler=sampler)
    made = generate(mol, settings, seed=0)
    again = generate(mol, settings, seed=0)
    assert torch.equal(made.positions, again.positions)
    torsions = rotatable_torsions(mol)
    rigid = templates(mol, rotatable_torsions(mol), 1, 0).positions
    energy = open_energy("mmff94", mol)
    line = torch.linspace(-math.pi, math.pi, 73, dtype=torch.float64)[:-1]
    e = energy.energy_and_forces(place(rigid[0], torsions, torch.cartesian_prod(line, line)))[0]

    def mean_at(kelvin):
        return float((torch.softmax(-e / (0.0019872043 * kelvin), 0) * e).sum())

    found = float((made.weights * made.energy).sum())
    assert abs(found - mean_at(300)) < 0.05 < 0.15 < abs(mean_at(600) - mean_at(300))
    assert made.provenance["templates"] == "1" and made.unit == "kcal/mol"


def test_a_rigid_molecule_and_ring_templates():
    """Benzene has one state; methylcyclohexane's chairs are templates with the weights of their energies."""
    benzene = generate(molecule("c1ccccc1"), ConformerSettings(n=3, coordinates="torsions"), seed=0)
    assert len(benzene) == 1 and benzene.ess == pytest.approx(1)
    ring = molecule("CC1CCCCC1")
    chairs = templates(ring, rotatable_torsions(ring), 4, 0)
    assert len(chairs.positions) >= 2 and float(chairs.share.sum()) == pytest.approx(1)
    made = generate(molecule("CC1CCCCC1"), ConformerSettings(n=4, coordinates="torsions"), seed=0)
    low = made.energy < made.energy.min() + 0.1
    assert float(made.weights[low].sum()) > 0.8


class Softer:
    """Half of MMFF94: at 300 K what MMFF94 is at 600 K."""

    name, unit, elements = "softer", "kcal/mol", None

    def __init__(self, mol):
        self.whole = open_energy("mmff94", mol)

    def energy_and_forces(self, x):
        energy, forces = self.whole.energy_and_forces(x)
        energy = energy / 2
        energy[: len(x) // 50] = torch.nan  # a few that do not converge
        return energy, forces / 2


def test_another_energy_weights_the_same_samples():
    """Samples of MMFF94 at 600 K, rescored at 600 K with half of it, have the mean of quadrature at 1200 K."""
    mol = molecule("OCc1ccccc1")
    sampler = TorsionalSettings(rounds=12, gradient_steps=20, minibatch=256)
    settings = ConformerSettings(temperature=600.0, n=3000, templates=1, sampler=sampler)
    made = generate(mol, settings, seed=0)
    again = rescored(made, open_energy("mmff94", mol), Softer(mol))
    assert again.unit == "kcal/mol" and again.provenance["sampled_with"] == "mmff94"
    assert (again.log_weights[:60] == -torch.inf).all() and again.energy[:60].isnan().all()
    line = torch.linspace(-math.pi, math.pi, 73, dtype=torch.float64)[:-1]
    torsions = rotatable_torsions(mol)
    x = place(templates(mol, torsions, 1, 0).positions[0], torsions, torch.cartesian_prod(line, line))
    e = open_energy("mmff94", mol).energy_and_forces(x)[0] / 2

    def mean_at(kelvin):
        return float((torch.softmax(-e / (0.0019872043 * kelvin), 0) * e).sum())

    found = float((again.weights[60:] * again.energy[60:]).sum())
    assert abs(found - mean_at(600)) < 0.08 < 0.15 < abs(mean_at(600) - mean_at(300))
    same = rescored(made, open_energy("mmff94", mol), open_energy("mmff94", mol))
    torch.testing.assert_close(same.weights, made.weights)


def test_shares_of_draws_do_not_change_the_weights(monkeypatch):
    """Cyclohexanol's chairs get unequal numbers of draws; weights are Z_j/Z by quadrature, and not without −log n_j."""
    mol = molecule("OC1CCCCC1")
    torsions, energy = rotatable_torsions(mol), open_energy("mmff94", mol)
    rigid, share, _ = templates(mol, torsions, 2, 0)
    monkeypatch.setattr("tiltflow.molecules.generate.low_templates", lambda *given: templates(*given[:4]))
    counts = torch.tensor(allot(2000, share), dtype=torch.float64) / 2000
    line = torch.linspace(-math.pi, math.pi, 361, dtype=torch.float64)[:-1, None]
    on_grid = torch.stack([energy.energy_and_forces(place(x, torsions, line))[0] for x in rigid])
    exact = torch.softmax(torch.logsumexp(-on_grid / (0.0019872043 * 300), 1), 0)
    sampler = TorsionalSettings(rounds=8, gradient_steps=15, minibatch=256)
    made = generate(mol, ConformerSettings(n=2000, templates=2, sampler=sampler), seed=0)
    heavy = [a.GetIdx() for a in mol.mol.GetAtoms() if a.GetAtomicNum() > 1]
    sites = made.positions[:, heavy]
    apart = [(torch.cdist(sites, sites) - torch.cdist(x[heavy], x[heavy])).abs().amax((1, 2)) for x in rigid]
    kind = torch.stack(apart).argmin(0)
    found = torch.zeros(2, dtype=torch.float64).index_add(0, kind, made.weights.double())
    uncorrected = found * counts / (found * counts).sum()  # the term log n_j dropped
    assert float((found - exact).abs().max()) < 0.02
    assert float((uncorrected - exact).abs().max()) > 0.04


def test_amides_turn_when_asked():
    """N-methylacetamide at 3,000 K: E and Z, in the ratio of quadrature; else as embedded, Z."""
    mol, kelvin = molecule("CC(=O)NC"), 3_000.0
    torsions = rotatable_torsions(mol, conjugated=True)
    assert len(torsions.atoms) == 1 and not len(rotatable_torsions(mol).atoms)
    settings = ConformerSettings(temperature=kelvin, n=2_000, templates=1, conjugated=True, sampler=QUICK)
    made = generate(mol, settings, seed=0)
    angles = dihedrals(made.positions, torsions.atoms)[:, 0]
    line = torch.linspace(-math.pi, math.pi, 361, dtype=torch.float64)[:-1, None]
    template = templates(mol, torsions, 1, 0).positions[0]
    e = open_energy("mmff94", mol).energy_and_forces(place(template, torsions, line))[0]
    exact = torch.softmax(-e * kt_per("kcal/mol", kelvin), 0)
    near = [float((w * (x.abs() < math.pi / 2)).sum()) for w, x in ((made.weights, angles), (exact, line[:, 0]))]
    assert near[0] == pytest.approx(near[1], abs=0.05) and 0.1 < near[1] < 0.9
    still = generate(mol, ConformerSettings(temperature=kelvin, n=4, coordinates="torsions"), seed=0)
    assert (dihedrals(still.positions, torsions.atoms).abs() < math.pi / 2).all()
