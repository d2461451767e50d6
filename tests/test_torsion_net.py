"""The network of torsions: what it must not depend on, what it must, and that one network learns several molecules."""

import math

import pytest
import torch

pytest.importorskip("rdkit")

from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.nn.torsion import TorsionNet, place_sites, torques
from tiltflow.molecules.systems import systems
from tiltflow.molecules.templates import embed
from tiltflow.molecules.torsions import place, rotatable_torsions

SMILES = ["OCC(N)C(=O)NCc1ccccc1C", "C#CCOc1ccccc1", "F/C=C/C[C@H](O)CS"]


def table_of(seed=0):
    pairs = [(mol, rotatable_torsions(mol), embed(mol, 1, seed)[0]) for mol in map(molecule, SMILES)]
    return pairs, systems(pairs)


def awake(table, **kw):
    """A network whose last layers are not zero."""
    torch.manual_seed(0)
    net = TorsionNet(table, 16, 2, basis=8, **kw).double()
    for layer in net.layers:
        torch.nn.init.normal_(layer.push.weight)
    return net


def test_sites_are_where_the_molecule_puts_them(generator):
    pairs, table = table_of()
    table = table._replace(template=table.template.double(), angles=table.angles.double())
    for s, (mol, torsions, template) in enumerate(pairs):
        d, n = len(torsions.atoms), int(table.sites[s])
        angles = 2 * math.pi * torch.rand(4, d, generator=generator, dtype=torch.float64)
        sites = place_sites(table.rows(torch.full((4,), s), d), angles)
        atoms = [a.GetIdx() for a in mol.mol.GetAtoms() if a.GetAtomicNum() != 1 or a.GetNeighbors()[0].GetAtomicNum() != 6]
        x = place(template, torsions, angles)[:, atoms]
        torch.testing.assert_close(sites[:, :n], x, atol=1e-5, rtol=0)
        assert n == len(atoms) and int(table.torsions[s]) == d


def test_torques_are_the_gradient_in_the_angles(generator):
    """τ_k ‖lever‖ = Σ_i f_i·∂x_i/∂θ_k, by autograd; a flipped sign is told apart."""
    _, table = table_of()
    rows = table.rows(torch.tensor([0, 1, 2]), table.angles.shape[1])
    angles = torch.randn(3, table.angles.shape[1], generator=generator).double().requires_grad_()
    force = torch.randn(3, rows.template.shape[1], 3, generator=generator).double()
    force = force * (torch.arange(force.shape[1]) < rows.sites[:, None])[..., None]
    force = force - force.sum(1, keepdim=True) / rows.sites[:, None, None]  # what it does to the whole is another matter
    x = place_sites(rows, angles)
    real = torch.arange(angles.shape[1]) < rows.torsions[:, None]
    work = (x * force).sum()
    exact = torch.autograd.grad(work, angles)[0]
    found = torques(rows, x.detach(), force)
    assert (found[~real] == 0).all()
    ratio = (exact / found)[real]
    assert (ratio > 0).all()  # the size of the lever
    assert not (exact / torques(rows, x.detach(), -force))[real].gt(0).any()


def test_invariances(generator):
    """Nothing changes with the molecule's pose, its row in the table, or padding; a mirror image changes the sign."""
    pairs, table = table_of()
    net = awake(table)
    d = table.angles.shape[1]
    x, t = torch.randn(5, d, generator=generator).double(), torch.rand(5, generator=generator).double()
    system = torch.full((5,), 2)
    field = net(x, t, system)
    count = int(table.torsions[2])
    assert (field[:, count:] == 0).all() and (field[:, :count].abs() > 1e-4).all()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())
    turn = (turn * turn.det().sign()).float()
    net.systems = systems([(*pairs[2][:2], (pairs[2][2].float() @ turn.T + 3).double())])
    alone = net(x[:, :count], t, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(alone, field[:, :count], atol=1e-4, rtol=1e-4)
    net.systems = systems([(*pairs[2][:2], pairs[2][2] * torch.tensor([1.0, 1.0, -1.0]))])
    mirrored = net(-x[:, :count], t, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(mirrored, -field[:, :count], atol=1e-4, rtol=1e-4)
    unturned = net(x[:, :count], t, torch.zeros(5, dtype=torch.long))
    assert not torch.allclose(unturned, field[:, :count], atol=1e-2)
    net.systems = table
    mixed = net(x, t, torch.tensor([2, 0, 1, 2, 0]))
    torch.testing.assert_close(mixed[[0, 3]], field[[0, 3]])
    torch.testing.assert_close(net(x + 2 * math.pi, t, system), field, atol=1e-6, rtol=1e-5)


def test_it_starts_at_zero_and_sees_the_elements(generator):
    _, table = table_of()
    x, t, system = torch.randn(4, table.angles.shape[1], generator=generator), torch.rand(4), torch.tensor([0, 1, 2, 0])
    assert (TorsionNet(table, 16, 2)(x, t, system) == 0).all()
    net = awake(table)
    before = net(x.double(), t.double(), system)
    net.systems = table._replace(atoms=torch.zeros_like(table.atoms))
    assert not torch.allclose(net(x.double(), t.double(), system), before, atol=1e-3)


def test_blocks_change_nothing(generator, monkeypatch):
    """Rows go through sorted and in blocks: the field of each is that of the row alone; another row's is not."""
    _, table = table_of()
    net = awake(table)
    system = torch.tensor([2, 0, 1, 0, 2, 1, 1])
    x, t = torch.randn(7, table.angles.shape[1], generator=generator).double(), torch.rand(7, generator=generator).double()
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], system[i : i + 1]) for i in range(7)])
    for block in (1, 2**12, 2**30):
        monkeypatch.setattr("tiltflow.molecules.nn.torsion.BLOCK", block)
        torch.testing.assert_close(net(x, t, system), alone)
    assert not torch.allclose(net(x, t, system.roll(1)), alone)
