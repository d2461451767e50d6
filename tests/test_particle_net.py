"""The particle network: what it is invariant to, against plain loops over pairs; and networks that are told the forces."""

import copy
import math

import pytest
import torch
from torch.nn.functional import silu

from tiltflow.core.errors import TiltflowError
from tiltflow.nn.features import time_features
from tiltflow.nn.informed import Informed
from tiltflow.nn.mlp import MLP
from tiltflow.nn.particles import ParticleNet


def shrinking(t):
    """A noise scale that falls to zero at t = 1, a thousandth of the shortest length being its floor."""
    return 2 * (1 - t)


def trained(particles, space, **options):
    """A network whose zero-initialised layers are random."""
    torch.manual_seed(0)
    net = ParticleNet(particles, space, **options)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return net


def points(generator, batch, particles, space, dtype=None):
    x = 1.5 * torch.randn(batch, particles, space, generator=generator, dtype=dtype)
    return x - x.mean(1, keepdim=True), torch.rand(batch, generator=generator, dtype=dtype)


def asymmetries(field, x, t, generator):
    """Largest violation of each symmetry, relative to the field."""
    space, f = x.shape[2], field(x, t)
    q = torch.linalg.qr(torch.randn(space, space, generator=generator, dtype=x.dtype))[0]
    mirror = torch.ones(space, dtype=x.dtype)
    mirror[0] = -1
    order = torch.randperm(x.shape[1], generator=generator)
    differences = {
        "rotation": field(x @ q, t) - f @ q,
        "reflection": field(x @ (q * mirror), t) - f @ (q * mirror),
        "permutation": field(x[:, order], t) - f[:, order],
        "translation": field(x + torch.linspace(-1, 1, space, dtype=x.dtype), t) - f,
        "mean": f.mean(1),
    }
    return {name: float(d.detach().abs().max() / f.detach().abs().max()) for name, d in differences.items()}


@pytest.mark.parametrize("noise", [None, shrinking])
@pytest.mark.parametrize(("particles", "space"), [(2, 1), (4, 2), (13, 3)])
def test_symmetries_in_single_precision(particles, space, noise, generator):
    net = trained(particles, space, noise=noise).float()
    x, t = points(generator, 32, particles, space, torch.float32)
    found = asymmetries(net, x, t, generator)
    assert net(x, t).dtype == torch.float32 and net(x, t).abs().max() > 0.1
    assert max(found.values()) < 1e-5, found


def test_broken_twins_fail_the_symmetries(generator):
    x, t = points(generator, 8, 5, 3)
    symmetric = trained(5, 3)  # pairs that push both particles the same way
    symmetric.signs = symmetric.signs.abs()
    assert asymmetries(symmetric, x, t, generator)["mean"] > 1e-2
    ordered = trained(5, 3)  # messages that see only one end of their pair
    ordered.first = ordered.second
    assert asymmetries(ordered, x, t, generator)["permutation"] > 1e-3
    net = trained(5, 3)
    stretched = asymmetries(lambda x, t: net(x * torch.tensor([1.0, 1.0, 2.0]), t), x, t, generator)
    assert stretched["rotation"] > 1e-2 and stretched["reflection"] > 1e-2
    held = asymmetries(lambda x, t: net(x, t) - 0.1 * x, x, t, generator)
    assert held["translation"] > 1e-2 and held["mean"] < 1e-10


def by_loops(net, x, t):
    """The equations of tiltflow/nn/particles.py for one sample x (N, m), t (): every ordered pair on its own."""
    count, n, s, far = len(x), math.sqrt(len(x) - 1), net.shortest, net.radial.inverse**-0.5
    features = time_features(t[None], net.frequencies)[0]
    if net.noise is not None:
        h2 = float(net.noise(t[None])) ** 2 + (s / 1000) ** 2
        features = torch.cat([features, torch.tensor([0.5 * math.log(h2)])])
    basis = len(net.radial.centre) if net.noise is None else 2 * len(net.radial.centre) // 3

    def rho(d):
        length = 0.5 * math.log((d * d + s * s) / (1 + d * d / far**2))
        centres, step = torch.linspace(math.log(s), math.log(far), basis), math.log(far / s) / (basis - 1)
        gaussians = [torch.exp(-(((length - centres) / step) ** 2) / 2)]
        if net.noise is not None:
            centres, step = torch.linspace(0, 1, basis // 2), 1 / (basis // 2 - 1)
            gaussians.append(torch.exp(-(((d * d / (d * d + h2) - centres) / step) ** 2) / 2))
        return torch.cat(gaussians)

    time = net.time[2](silu(net.time[0](features)))
    y, h, f = x.clone(), [time] * count, torch.zeros_like(x)
    for layer in net.layers:
        new_y, received = y.clone(), [torch.zeros_like(time) for _ in range(count)]
        for i in range(count):
            for j in range(count):
                if i == j:
                    continue
                d = float((y[i] - y[j]).norm())
                u = (y[i] - y[j]) / math.sqrt(d * d + s * s)
                m = silu(layer.message(silu(layer.node.weight @ (h[i] + h[j]) + layer.radial(rho(d)))))
                c = silu(layer.coordinate(m))
                f[i] += u * (layer.push.weight[0] @ c) / n
                if not layer.last:
                    new_y[i] += s * u * (layer.move.weight[0] @ c) / n
                    received[i] = received[i] + m / n
        if not layer.last:
            y = new_y
            h = [a + layer.update(silu(layer.own(a) + layer.received(b))) for a, b in zip(h, received)]
    return f + net.gate(silu(time)) * (x - x.mean(0))


@pytest.mark.parametrize("noise", [None, shrinking])
def test_equals_plain_loops_over_pairs(noise, generator):
    net = trained(4, 3, hidden=8, lengths=(0.4, 4.0), noise=noise)
    x, t = points(generator, 3, 4, 3)
    x = x + 1.0
    with torch.no_grad():
        plain = torch.stack([by_loops(net, a, b) for a, b in zip(x, t)])
        assert (net(x, t) - plain).abs().max() < 1e-10
        net.layers[1].node.weight *= 1.01
        assert (net(x, t) - plain).abs().max() > 1e-6  # the comparison sees a single layer
    assert net(x, t).requires_grad


def test_starts_at_zero_and_every_parameter_learns(generator):
    torch.manual_seed(0)
    net = ParticleNet(5, 2, hidden=16, noise=shrinking)
    x, t = points(generator, 64, 5, 2)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        field = net(x, t)
        assert step > 0 or not field.any()
        loss = (field - x * x.norm(dim=-1, keepdim=True).mean(1, keepdim=True)).square().mean()
        loss.backward()
        losses.append(loss.item())
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert step == 0 or still == [], f"no gradient after {step} steps"
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_blocks_of_the_batch_change_nothing(generator):
    x, t = points(generator, 11, 5, 2)
    results = []
    for block in (100, 4, 1):
        net = trained(5, 2, hidden=8)
        net.block = block
        field = net(x, t)
        field.square().sum().backward()
        results.append([field.detach(), *(p.grad for p in net.parameters())])
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(results[0], other))


def test_derivatives_and_copies(generator):
    net = trained(3, 2, hidden=4, layers=2, noise=shrinking)
    x, t = points(generator, 2, 3, 2)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: net(x, t), x)
    together = torch.zeros(2, 3, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(net(together, torch.ones(2)).square().sum() + net(together, t).sum(), together)
    assert slope.isfinite().all()  # particles on top of each other, no noise left
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x, t), net(x, t))


@pytest.mark.slow
def test_compilation_changes_nothing(generator):
    net = trained(3, 2, hidden=4, layers=2, noise=shrinking)
    x, t = points(generator, 2, 3, 2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, t), net(x, t), rtol=1e-12)
    with torch.no_grad():
        assert torch.allclose(compiled(x, t), net(x, t), rtol=1e-12)


def test_errors_name_the_argument():
    with pytest.raises(TiltflowError, match="at least 2 particles"):
        ParticleNet(1, 3)
    with pytest.raises(TiltflowError, match="shortest"):
        ParticleNet(4, 2, lengths=(2.0, 1.0))
    with pytest.raises(TiltflowError, match=r"takes \(B, 4, 2\)"):
        ParticleNet(4, 2)(torch.zeros(3, 2, 4), torch.zeros(3))


def spring(x):
    return (x.mean(1, keepdim=True) - x).clamp(-3, 3)


def test_informed_starts_at_its_net_and_learns_the_gate(generator):
    net = trained(4, 2, hidden=8)
    informed = Informed(net, spring)
    x, t = points(generator, 256, 4, 2)
    assert torch.equal(informed(x, t), net(x, t))
    for p in net.parameters():
        p.requires_grad_(False)
    target = net(x, t) + 2 * t[:, None, None] * spring(x)
    optimiser = torch.optim.Adam(informed.gate.parameters(), lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        (informed(x, t) - target).square().mean().backward()
        optimiser.step()
    gate = informed.gate(time_features(t, informed.frequencies))[:, 0]
    assert (gate - 2 * t).abs().max() < 0.05
    found = asymmetries(informed, x, t, generator)  # clipped entry by entry, a force no longer turns
    assert max(found["permutation"], found["translation"]) < 1e-10 and min(found["rotation"], found["mean"]) > 1e-4
    informed.force = lambda x: x.mean(1, keepdim=True) - x
    assert max(asymmetries(informed, x, t, generator).values()) < 1e-10


def test_informed_opens_for_vectors_and_checks_the_force(generator):
    torch.manual_seed(0)
    informed = Informed(MLP(3, 3), lambda x: -x)
    torch.nn.init.constant_(informed.gate.bias, 0.7)
    x, t = torch.randn(5, 3, generator=generator), torch.rand(5, generator=generator)
    assert torch.allclose(informed(x, t), -0.7 * x)
    informed(x, t).square().sum().backward()
    assert informed.gate.weight.grad.any() and informed.net.last.weight.grad.any()
    with pytest.raises(TiltflowError, match="force returned"):
        Informed(MLP(3, 3), lambda x: x.sum(1))(x, t)
