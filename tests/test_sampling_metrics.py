"""Sampling metrics against closed forms, brute force, and the floors of the stored reference sets."""

import itertools
import math

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.metrics import particles
from tiltflow.metrics.distance import w2
from tiltflow.metrics.particles import distance_wasserstein, interatomic_distances, particle_w2
from tiltflow.metrics.sampling import energy_w2, mode_coverage, mode_weights, torsion_kl, wasserstein_1d


def orthogonal(n, m, generator):
    return torch.linalg.qr(torch.randn(n, m, m, generator=generator)).Q  # reflections too


def disguised(x, generator):
    """Copies of x (n, N, m), shuffled, shifted, rotated or reflected, with their particles permuted."""
    order = torch.stack([torch.randperm(x.shape[1], generator=generator) for _ in x])
    moved = x.gather(1, order[..., None].expand_as(x)) @ orthogonal(len(x), x.shape[2], generator)
    return (moved + torch.randn(len(x), 1, x.shape[2], generator=generator))[torch.randperm(len(x), generator=generator)]


def test_energy_w2_of_gaussians(generator):
    e1, e2 = 1 + 2 * torch.randn(20_000, generator=generator), 4 + 6 * torch.randn(15_000, generator=generator)
    exact = (3**2 + 4**2) ** 0.5  # without the square root it would be 25
    assert energy_w2(e1, e2) == pytest.approx(exact, rel=0.03)
    assert energy_w2(e1, e2) == pytest.approx(energy_w2(e2, e1))


def test_w2_on_the_line_equals_assignment_of_repeated_points(generator):
    a, b = torch.randn(6, generator=generator), 2 * torch.randn(4, generator=generator)
    twelve = a.repeat_interleave(2), b.repeat_interleave(3)  # the same two laws, in sets of equal size
    assert wasserstein_1d(a, b) == pytest.approx(w2(twelve[0][:, None], twelve[1][:, None]))
    expected = float((twelve[0].sort().values - twelve[1].sort().values).abs().mean())
    assert wasserstein_1d(a, b, 1) == pytest.approx(expected)
    assert wasserstein_1d(a, a.flip(0)) == 0
    assert wasserstein_1d(a, a + 3, 4) == pytest.approx(3)


def test_energies_that_are_not_finite_are_counted():
    with pytest.raises(TiltflowError, match="2 of 3 energies"):
        energy_w2(torch.tensor([1.0, math.inf, math.nan]), torch.ones(2))
    with pytest.raises(TiltflowError, match="non-empty"):
        energy_w2(torch.ones(0), torch.ones(2))
    with pytest.raises(TiltflowError, match="p ≥ 1"):
        wasserstein_1d(torch.ones(2), torch.ones(2), 0)


@pytest.mark.parametrize(("name", "published", "spread"), [("dw4", 0.11, 0.03), ("lj13", 0.41, 0.11)])
def test_floor_of_energy_w2_at_2000_samples(name, published, spread, generator):
    problem = ENERGY_PROBLEMS[name]()
    energies = problem.energy(problem.reference().double())
    floors = []
    for _ in range(20):
        i = torch.randperm(len(energies), generator=generator)
        floors.append(energy_w2(energies[i[:2000]], energies[i[2000:4000]]))
    assert abs(sum(floors) / len(floors) - published) < spread


@pytest.mark.parametrize(("n", "m"), [(4, 2), (6, 2), (9, 3)])
def test_disguised_copies_are_at_distance_zero(n, m, generator):
    x = torch.randn(20, n, m, generator=generator)
    y = disguised(x, generator)
    assert particle_w2(x, y) < 1e-6
    assert w2(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)) > 0.5  # without alignment


def test_particle_w2_has_its_square_root(generator):
    x = torch.randn(30, 4, 2, generator=generator)
    x = x - x.mean(1, keepdim=True)
    expected = 1e-3 * float(x.square().sum((1, 2)).mean()) ** 0.5  # too small a change for any other matching
    assert particle_w2(x, disguised(1.001 * x, generator)) == pytest.approx(expected, rel=1e-4)


def test_planar_distance_equals_brute_force(generator):
    x, y = torch.randn(2, 5, 4, 2, generator=generator)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    angles = torch.linspace(0, 2 * math.pi, 1441)[:-1]
    turn = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(-1, 2, 2)
    group = torch.cat([turn, turn @ torch.diag(torch.tensor([1.0, -1.0]))])
    best = torch.full((5, 5), math.inf)
    for order in itertools.permutations(range(4)):
        moved = (y[:, None, list(order)] @ group).flatten(2)  # (5, G, 8)
        square = (x.flatten(1)[:, None, None] - moved).square().sum(-1)
        best = torch.minimum(best, square.amin(2))
    exact = particles._planar(x, y)
    assert bool((exact <= best + 1e-12).all())  # the grid is no better
    torch.testing.assert_close(exact, best, atol=2e-4, rtol=0)
    assert particle_w2(x, y) == pytest.approx(particle_w2(y, x))


def test_bound_is_above_the_exact_distance_and_close(generator, monkeypatch):
    problem = ENERGY_PROBLEMS["dw4"]()
    x, y = problem.reference()[:60].double(), problem.reference()[60:120].double()
    exact, there = particle_w2(x, y), particles._planar(x, y)
    bound = particles._bounds(x, y)
    assert bool((bound >= there - 1e-9).all())
    monkeypatch.setattr(particles, "EXACT_PARTICLES", 0)
    assert exact <= particle_w2(x, y) < 1.02 * exact
    assert particle_w2(y, x) == pytest.approx(particle_w2(x, y), rel=0.02)


def test_bound_of_lj13_halves(generator):
    reference = ENERGY_PROBLEMS["lj13"]().reference()
    x = reference[torch.randperm(len(reference), generator=generator)[:32]]
    floor = particle_w2(x[:16], x[16:])
    assert 1.2 < floor < 1.75
    assert particle_w2(x[:16], 1.3 * x[16:]) > floor + 0.15


def test_configurations_that_do_not_match_are_refused():
    with pytest.raises(TiltflowError, match="equal shape"):
        particle_w2(torch.zeros(3, 4, 2), torch.zeros(4, 4, 2))
    with pytest.raises(TiltflowError, match=r"\(n, N, m\)"):
        particle_w2(torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(TiltflowError, match="1 of 3 configurations of y"):
        particle_w2(torch.zeros(3, 4, 2), torch.tensor([0.0, math.nan, 0.0]).view(3, 1, 1).expand(3, 4, 2))


def test_interatomic_distances(generator):
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]]])
    assert sorted(interatomic_distances(x).tolist()) == [3, 4, 5]
    y = torch.randn(50, 5, 3, generator=generator)
    assert interatomic_distances(y).shape == (500,)
    assert distance_wasserstein(y, disguised(y, generator)) < 1e-9
    pooled = interatomic_distances(y)
    assert distance_wasserstein(y, 2 * y, 1) == pytest.approx(float(pooled.mean()))
    assert distance_wasserstein(y, 2 * y) == pytest.approx(float(pooled.square().mean()) ** 0.5)


def von_mises(concentration, n, generator):
    """Exact draws by rejection from the uniform law."""
    phi = math.pi * (2 * torch.rand(20 * n, generator=generator) - 1)
    keep = torch.rand(len(phi), generator=generator).log() < concentration * (phi.cos() - 1)
    return phi[keep][:n]


def test_torsion_kl_of_von_mises(generator):
    n = 100_000
    uniform, narrow = math.pi * (2 * torch.rand(n, generator=generator) - 1), von_mises(2.0, n, generator)
    i0, i1 = (float(f(torch.tensor(2.0))) for f in (torch.special.i0, torch.special.i1))
    forward, reverse = 2 * i1 / i0 - math.log(i0), math.log(i0)
    assert torsion_kl(narrow, uniform) == pytest.approx(forward, rel=0.02)
    assert torsion_kl(uniform, narrow) == pytest.approx(reverse, rel=0.02)  # the other direction
    assert abs(forward - reverse) > 0.1
    both = torch.stack([narrow, uniform], 1), torch.stack([uniform, uniform.flip(0)], 1)
    assert torsion_kl(*both, bins=16) == pytest.approx(forward, rel=0.03)  # independent angles: the sum
    assert torsion_kl(narrow + 4 * math.pi, narrow) == pytest.approx(0, abs=1e-3)
    apart = torsion_kl(torch.full((100,), -1.0), torch.full((100,), 1.0))
    assert 4 < apart < 20  # finite
    with pytest.raises(TiltflowError, match="of one kind"):
        torsion_kl(narrow, both[1])


def test_modes(generator):
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    which = torch.multinomial(torch.tensor([0.7, 0.3, 0.0]), 20_000, True, generator=generator)
    x = centres[which] + torch.randn(20_000, 2, generator=generator)
    torch.testing.assert_close(mode_weights(x, centres), torch.tensor([0.7, 0.3, 0.0]), atol=0.012, rtol=0)
    assert mode_coverage(x, centres, 1.0) == 2
    assert mode_coverage(x, centres, 20.0) == 3
    assert mode_coverage(torch.full((1, 2), 5.0), centres, 1.0) == 0  # nearest to some centre, but far from all
    with pytest.raises(TiltflowError, match="one shape"):
        mode_weights(x, torch.zeros(3, 3))
