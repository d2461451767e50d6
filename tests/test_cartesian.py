"""The Cartesian sampler: its network's symmetries, its penalties, its source, and a closed form of distances."""

import pytest
import torch

pytest.importorskip("rdkit")

from dataclasses import replace
from functools import partial

from tiltflow.bench import conformers as bench_conformers
from tiltflow.core.brownian import geometric_chain
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred
from tiltflow.methods.bridge_sampling import AdjointBridgeSampling
from tiltflow.molecules.audit import audit
from tiltflow.molecules.cartesian import aligned, harmonic_source, train_cartesian
from tiltflow.molecules.energies import kt_per, open_energy
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.nn.molecule import MoleculeNet
from tiltflow.molecules.regular import regulariser, stereocentres, volumes
from tiltflow.molecules.settings import CartesianSettings
from tiltflow.molecules.templates import embed
from tiltflow.sampling.train import noise_left

CHIRAL, FLAT = "F/C=C/C[C@H](O)CS", "CC(=O)Oc1ccccc1C(=O)O"
MIRROR = torch.tensor([1.0, 1.0, -1.0])
LEFT = partial(noise_left, "geometric", 1.0, 0.03)


def rotation(generator):
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    return turn * turn.det()


def awake(smiles):
    """A network whose last layers are not zero, and a geometry."""
    mol = molecule(smiles)
    x = embed(mol, 1, 0)
    torch.manual_seed(0)
    net = MoleculeNet(mol, x[0], LEFT, 16, 2, basis=8)
    for layer, spring, invert in zip(net.layers, net.springs, net.inversions):
        for part in (layer.push, spring, invert):
            torch.nn.init.normal_(part.weight, std=0.1)
    return net.float(), x.float()


@pytest.mark.parametrize("smiles", [CHIRAL, FLAT])
def test_the_field_turns_with_the_molecule(smiles, generator):
    """Rotations and shifts to 1e-5 in single precision, no mean; a mirror image is another molecule only if it is chiral."""
    net, x = awake(smiles)
    x = x + 0.2 * torch.randn(4, *x.shape[1:], generator=generator).float()
    t, turn = torch.rand(4, generator=generator).float(), rotation(generator).float()
    field = net(x, t)
    size = float(field.detach().abs().max())
    assert 0.05 < size < 50
    torch.testing.assert_close(net(x @ turn + 1.5, t), field @ turn, atol=1e-5 * max(size, 1), rtol=1e-5)
    assert float(field.detach().mean(1).abs().max()) < 1e-5 * size
    mirrored, mirror = net(x * MIRROR.float(), t), field * MIRROR.float()
    assert torch.allclose(mirrored, mirror, atol=1e-4 * size) == (smiles == FLAT)
    assert float((mirrored - mirror).detach().abs().max()) > 0.02 * size or smiles == FLAT
    assert not torch.allclose(field[:1], net(x[:1], t[:1] / 2), atol=0.02 * size)


def test_the_field_starts_at_zero_and_does_not_depend_on_blocks(generator):
    mol = molecule(CHIRAL)
    x = embed(mol, 1, 0)
    assert (MoleculeNet(mol, x[0], LEFT)(x + 0.1, torch.rand(1)) == 0).all()
    net, x = awake(CHIRAL)
    x, t = x + 0.2 * torch.randn(5, *x.shape[1:]).float(), torch.rand(5).float()
    whole = net(x, t)
    net.block = 2
    torch.testing.assert_close(net(x, t), whole)
    with pytest.raises(TiltflowError, match="this network takes"):
        net(x[:, :-1], t)


def test_penalties_are_zero_where_the_molecule_is_sound(generator):
    """On embeddings, and not on a stretched bond, the mirror image, or the other side of the double bond."""
    mol = molecule(CHIRAL)
    x = embed(mol, 20, 1, relaxed=True)
    energy = regulariser(mol, embed(mol, 1, 0)[0])
    x.requires_grad_(True)
    value = energy(x)
    assert (value == 0).all() and (torch.autograd.grad(value.sum(), x)[0] == 0).all()
    assert (energy(x.detach() * MIRROR) > 100).all()
    other = embed(molecule(CHIRAL.replace("F/C=C/", "F/C=C\\")), 5, 0)
    assert (energy(other) > 100).all()
    assert (energy(1.5 * x.detach()) > 10).all()
    y = (x.detach()[:2] * MIRROR + 0.3 * torch.randn(2, *x.shape[1:], generator=generator)).requires_grad_(True)
    assert torch.autograd.gradcheck(energy, y)


def test_the_source_is_the_chain_of_springs(generator):
    """Distances over bonds and across the chain have the Gaussian's mean squares; the mass centre is 0."""
    bonds, lengths = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor([1.0, 1.5, 2.0])
    x = harmonic_source(bonds, lengths, 4)(40_000, generator)
    assert float(x.mean(1).abs().max()) < 1e-12
    for i, j, square in ((0, 1, 1.0), (1, 2, 2.25), (2, 3, 4.0), (0, 3, 7.25)):
        assert float(((x[:, i] - x[:, j]) ** 2).sum(1).mean()) == pytest.approx(square, rel=0.03)


def test_aligning_turns_and_never_mirrors(generator):
    mol = molecule(CHIRAL)
    x = embed(mol, 4, 0)
    x = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(aligned(x @ rotation(generator) + 3, x), x, atol=1e-8, rtol=0)
    fitted = aligned(x * MIRROR, x)
    centres = stereocentres(mol)
    assert (volumes(fitted, centres).sign() == -volumes(x, centres).sign()).all()
    assert float((fitted - x).norm()) < float((x * MIRROR @ rotation(generator) - x).norm())


def test_an_unknown_target_is_refused():
    chain = geometric_chain(Centred(), (3, 3), 5, 1.0, 0.1)
    with pytest.raises(TiltflowError, match="choose adjoint or least_variance"):
        AdjointBridgeSampling(chain, None, None, target="magic")


# Against closed forms


class Springs:
    """E = ½ k Σ (d − d°)², in kcal/mol, over the three distances of a bent molecule."""

    name, unit, elements = "springs", "kcal/mol", None

    def __init__(self, stiffness):
        self.k, self.bonds = stiffness, torch.tensor([[0, 1], [0, 2], [1, 2]])
        self.rest = torch.tensor([0.97, 0.97, 1.55])

    def energy_and_forces(self, x):
        with torch.enable_grad():
            x = x.detach().double().requires_grad_(True)
            d = (x[:, self.bonds[:, 0]] - x[:, self.bonds[:, 1]]).norm(dim=-1)
            energy = 0.5 * self.k * ((d - self.rest.to(d)) ** 2).sum(1)
            (slope,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), -slope


def moments(springs, kelvin):
    """Means and variances of the three distances: the measure of a triangle's shape is d_1 d_2 d_3 dd_1 dd_2 dd_3."""
    line = torch.linspace(0.3, 2.2, 96)
    d = torch.cartesian_prod(line, line, line)
    whole = (d[:, 2] < d[:, 0] + d[:, 1]) & (d[:, 2] > (d[:, 0] - d[:, 1]).abs())
    energy = 0.5 * springs.k * ((d - springs.rest) ** 2).sum(1) * kt_per("kcal/mol", kelvin)
    p = torch.softmax(torch.where(whole, d.log().sum(1) - energy, -torch.inf), 0)
    mean = (p[:, None] * d).sum(0)
    return mean, (p[:, None] * (d - mean) ** 2).sum(0)


@pytest.fixture
def single():
    """Networks and states in single precision, as on the command line; the suite's own fixture puts it back."""
    torch.set_default_dtype(torch.float32)


SMALL = CartesianSettings(rounds=20, batch=128, gradient_steps=20, minibatch=128, hidden=16, layers=2)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_water_on_springs_has_the_distances_of_quadrature(single, seed):
    """Means and variances of all distances at 300 K; those of 600 K are told apart."""
    mol = molecule("O")
    springs = Springs(60.0)
    trained = train_cartesian(springs, 300.0, mol, replace(SMALL, rounds=12, fine_rounds=8), seed)
    drawn = trained.draw(4000, torch.Generator().manual_seed(seed))
    x = drawn.x.double()
    d = (x[:, springs.bonds[:, 0]] - x[:, springs.bonds[:, 1]]).norm(dim=-1)
    mean, variance = moments(springs, 300.0)
    assert float((d.mean(0) - mean).abs().max()) < 0.02
    assert float((d.var(0) / variance - 1).abs().max()) < 0.2
    assert float((d.var(0) / moments(springs, 600.0)[1] - 1).abs().min()) > 0.35
    assert drawn.log_weights is None and float(x.mean(1).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_chiral_molecule_keeps_its_chirality(single):
    """Every draw of an energy that is blind to it; the mirror images are found out."""
    mol = molecule("F[C@H](Cl)Br")
    trained = train_cartesian(open_energy("mmff94", mol), 700.0, mol, SMALL, 0)
    x = trained.draw(200, torch.Generator().manual_seed(0)).x
    assert sum(fault is None for fault in audit(mol, x)) > 190
    assert all("inverted" in str(fault) for fault in audit(mol, x * MIRROR.to(x)) if fault)
    assert sum(fault is None for fault in audit(mol, x * MIRROR.to(x))) < 10
    torch.testing.assert_close(trained.energy.value(x), trained.draw(200, torch.Generator().manual_seed(0)).energy)


@pytest.mark.slow
def test_pretraining_makes_bonds(single):
    """Bridge matching alone has the bonds of RDKit's conformers; without it they are those of the source."""
    mol = molecule("CC(=O)O")
    bonds, lengths = regulariser(mol, embed(mol, 1, 0, relaxed=True)[0]).bonds, embed(mol, 20, 3, relaxed=True)

    def error(pretrain):
        settings = replace(SMALL, pretrain=pretrain, pretrain_rounds=15, rounds=0)
        trained = train_cartesian(open_energy("mmff94", mol), 700.0, mol, settings, 0)
        x = trained.draw(200, torch.Generator().manual_seed(0)).x
        found, exact = ((y[:, bonds[:, 0]] - y[:, bonds[:, 1]]).norm(dim=-1) for y in (x.double(), lengths))
        return float((found - exact.mean(0)).abs().mean())

    assert error(20) < 0.08 < 0.4 < error(0)


@pytest.mark.slow
def test_the_benchmark_draws_sound_conformers(single):
    """n of them, by the seed, and an error where the sampler makes none."""
    mol = molecule("C[C@H](F)O")
    made = bench_conformers.cartesian(mol, 30, 0, SMALL)
    assert made.positions.shape == (30, 9, 3) and not any(audit(mol, made.positions))
    assert made.energy_calls > 20 * 128 + 30 - 1
    with pytest.raises(TiltflowError, match="of 30 in 5 attempts"):
        bench_conformers.cartesian(mol, 30, 0, replace(SMALL, rounds=0))
