"""Energies against what is known exactly of them, and what stands between them and a sampler. Each bad twin is rejected."""

import math
import sys

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.energies import ENERGY_PROBLEMS, Evaluator, ForceProvider, load_reference, virial
from tiltflow.energies.particles import DoubleWell, LennardJones
from tiltflow.energies.toys import RADII, many_well_energy
from tiltflow.problems.tilt import GaussianMixture

SEEDS = [0, 1, 2]
PORTABLE = [name for name in ENERGY_PROBLEMS if name != "alanine"]
EXACT = [name for name in PORTABLE if name not in ("dw4", "lj13", "lj55")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def states(problem, n, generator):
    """Where the base puts its mass."""
    return problem.geometry.wrap(problem.scale * torch.randn(n, *problem.event_shape, generator=generator))


def deviation(values, expected):
    """(mean − expected) in standard errors."""
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


# Problems


@pytest.mark.parametrize("name", PORTABLE)
def test_every_problem_keeps_its_promises(name, generator):
    """Shapes, dtypes, gradients against central differences, modes that are a distribution."""
    problem = ENERGY_PROBLEMS[name]()
    assert problem.name == name and 0 < problem.finest < problem.scale
    x = 0.5 * states(problem, 8, generator)
    assert problem.energy(x).shape == (8,) and problem.energy(x.float()).dtype == torch.float32
    torch.testing.assert_close(problem.energy(x.float()).double(), problem.energy(x), rtol=1e-2, atol=1e-2)
    _, grad = Evaluator(problem.energy).value_and_grad(x)
    d = torch.randn(x.shape, generator=generator)
    h = 1e-6
    difference = (problem.energy(x + h * d) - problem.energy(x - h * d)) / (2 * h)
    torch.testing.assert_close((grad * d).flatten(1).sum(1), difference, rtol=1e-4, atol=1e-4)
    if problem.modes is not None:
        assert problem.modes.centres.shape == (len(problem.modes.weights), *problem.event_shape)
        assert float(problem.modes.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert problem.modes.centres.dtype == problem.modes.weights.dtype == torch.float64


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_belong_to_the_energy(name):
    """E[x·∇E] = d on every seed, jointly χ²; draws at twice the temperature are rejected."""
    problem = ENERGY_PROBLEMS[name]()
    d, z, wrong = math.prod(problem.event_shape), [], []
    for seed in SEEDS:
        x = problem.sample(20_000, seeded(seed))
        assert x.shape == (20_000, *problem.event_shape) and x.dtype == torch.float64
        for energy, out in ((problem.energy, z), (lambda y: 2 * problem.energy(y), wrong)):
            mean, error = virial(energy, x)
            out.append((mean - d) / error)
    assert sum(v * v for v in z) < 16  # χ² of three: exceeded once in a thousand
    assert sum(v * v for v in wrong) > 50


def grid2d(low, high, points):
    line = torch.linspace(low, high, points)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


@pytest.mark.parametrize(
    "name, reach, points",
    [
        ("gmm9", 9, 361),
        ("gmm40", 48, 481),
        ("unequal2d", 12, 241),
        ("gaussian2d", 9, 361),
        ("ring", 7, 701),
        ("many-well", 8, 801),
    ],
)
def test_log_z_is_the_sum_over_a_grid(name, reach, points):
    """In 2-D; of many-well one of its 16 equal pairs."""
    problem = ENERGY_PROBLEMS[name]()
    x, area = grid2d(-reach, reach, points)
    energy = torch.cat([(many_well_energy if name == "many-well" else problem.energy)(part) for part in x.split(20_000)])
    log_z = float(torch.logsumexp(-energy, 0)) + math.log(area)
    assert problem.log_z == pytest.approx(log_z * (16 if name == "many-well" else 1), abs=1e-5)


@pytest.mark.parametrize("name", ["gmm40-50d", "funnel"])
@pytest.mark.parametrize("seed", SEEDS)
def test_log_z_in_many_dimensions_by_a_known_density(name, seed):
    """E_p*[q/p*] = 1 for a normalised q that p* covers; a log Z that is .3 off is rejected."""
    problem = ENERGY_PROBLEMS[name]()
    x = problem.sample(30_000, seeded(seed))
    normal = torch.distributions.Normal
    if name == "funnel":
        q = normal(0.0, 2.0).log_prob(x[:, 0]) + normal(0.0, 0.9 * (0.5 * x[:, :1]).exp()).log_prob(x[:, 1:]).sum(1)
    else:
        q = normal(problem.modes.centres[7], 1.3).log_prob(x).sum(1)
    energy = torch.cat([problem.energy(part) for part in x.split(1000)])
    ratio = (q + energy + problem.log_z).exp()
    assert abs(deviation(ratio, 1)) < 3.5
    assert abs(deviation(ratio, math.exp(0.3))) > 3.5


@pytest.mark.parametrize("seed", SEEDS)
def test_moments_of_exact_draws(seed):
    g, n = seeded(seed), 40_000
    x = ENERGY_PROBLEMS["gaussian2d"]().sample(n, g)
    assert abs(deviation(x[:, 0], 1)) < 4 and abs(deviation(x[:, 1], -0.5)) < 4 < abs(deviation(x[:, 1], 0.5))
    assert abs(deviation((x[:, 0] - 1) * (x[:, 1] + 0.5), 0.6)) < 4
    x = ENERGY_PROBLEMS["funnel"]().sample(n, g)
    assert abs(deviation(x[:, 0] ** 2, 9)) < 4
    scaled = x[:, 1:] / (0.5 * x[:, :1]).exp()  # the other width, e^{x_0}, is the bad twin
    assert abs(deviation(scaled.square().mean(1), 1)) < 4 < abs(deviation((x[:, 1:] / x[:, :1].exp()).square().mean(1), 1))
    x = ENERGY_PROBLEMS["ring"]().sample(n, g)
    nearest = (x.norm(dim=1, keepdim=True) - torch.tensor(RADII)).abs().argmin(1)
    for k, radius in enumerate(RADII):
        assert abs(deviation((nearest == k).double(), radius / sum(RADII))) < 4
    x = ENERGY_PROBLEMS["many-well"]().sample(n, g)[:, 0::2].flatten()
    line = torch.linspace(-5, 5, 4001)
    density = (-(line**4 - 6 * line**2 - line / 2)).exp()
    for f in (lambda y: (y > 0).double(), lambda y: y, lambda y: y * y):
        assert abs(deviation(f(x), float((f(line) * density).sum() / density.sum()))) < 4.5


@pytest.mark.parametrize("name", ["gmm9", "gmm40", "unequal2d", "gmm40-50d"])
def test_mode_weights_are_the_shares_of_the_nearest_centres(name):
    """χ² of the shares; with a fifth of the first mode's mass in the last it is rejected."""
    problem, n = ENERGY_PROBLEMS[name](), 60_000
    nearest = torch.cdist(problem.sample(n, seeded(5)), problem.modes.centres).argmin(1)
    weights = problem.modes.weights
    moved = weights.clone()
    moved[0], moved[-1] = 0.8 * weights[0], weights[-1] + 0.2 * weights[0]
    freedom = len(weights) - 1
    limit = freedom + 3.5 * (2 * freedom) ** 0.5 + 3
    chi2 = [float(((nearest.bincount(minlength=len(w)) - n * w) ** 2 / (n * w)).sum()) for w in (weights, moved)]
    assert chi2[0] < limit < chi2[1]


def test_mixture_energy_equals_the_general_mixture(generator):
    problem = ENERGY_PROBLEMS["gmm9"]()
    general = GaussianMixture.isotropic(torch.arange(1, 10) / 45, problem.energy.means, 0.5)
    x = states(problem, 100, generator)
    torch.testing.assert_close(problem.energy(x), -general.log_prob(x))
    equal = GaussianMixture.isotropic(torch.full((9,), 1 / 9), problem.energy.means, 0.5)
    assert (problem.energy(x) + equal.log_prob(x)).abs().max() > 0.1


def test_gmm40_is_the_fields():
    """Means of seed 0 with torch's global generator, left as it was."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    expected = (torch.rand((40, 2), dtype=torch.float32) - 0.5) * 2 * 40
    torch.random.set_rng_state(state)
    energy = ENERGY_PROBLEMS["gmm40"]().energy
    assert torch.equal(energy.means.float(), expected) and energy.std == pytest.approx(1.3132616875)


# Particles


@pytest.mark.parametrize("name, freedom", [("dw4", 6), ("lj13", 36), ("lj55", 162)])
def test_virial_accepts_the_reference_and_rejects_miscounted_pairs(name, freedom):
    problem = ENERGY_PROBLEMS[name]()
    x = problem.reference()
    assert x.shape[1:] == problem.event_shape and len(x) in (10_000, 3_200) and x.dtype == torch.float32
    assert float(x.mean(1).abs().max()) < 1e-6 and problem.geometry.dimension(problem.event_shape) == freedom
    right = virial(problem.energy, x)
    assert abs(right.mean - freedom) < 2 * right.standard_error and right.standard_error < 0.07 * freedom
    twins = [LennardJones(depth=1.0), LennardJones(depth=4.0)] if name == "lj13" else [lambda y: 2 * problem.energy(y)]
    for twin in twins:
        wrong = virial(twin, x)
        assert abs(wrong.mean - freedom) > 5 * wrong.standard_error
    mean = {"dw4": -22.54, "lj13": -43.13, "lj55": -325.78}[name]
    assert float(problem.energy(x.double()).mean()) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_particle_energies_equal_their_definitions(dtype, generator):
    """A loop over pairs, written from the formula."""
    x = (1.5 * torch.randn(3, 5, 3, generator=generator)).to(dtype)
    double_wells, lennard_jones = torch.zeros(2, 3, dtype=dtype)
    for i in range(5):
        for j in range(i):
            r = (x[:, i] - x[:, j]).norm(dim=1)
            double_wells += -4 * (r - 4) ** 2 + 0.9 * (r - 4) ** 4
            lennard_jones += 2 * (r**-12 - 2 * r**-6)
    lennard_jones += 0.5 * (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(DoubleWell()(x), double_wells)
    torch.testing.assert_close(LennardJones()(x), lennard_jones)


def test_colliding_particles_are_rejected_not_softened(generator):
    x = 2 * torch.randn(4, 13, 3, generator=generator, dtype=torch.float32)
    x[1, 3], x[2, 3] = x[1, 5], x[2, 5] + 1e-5
    assert (LennardJones()(x).isinf() == torch.tensor([False, True, True, False])).all()
    energy = Evaluator(LennardJones())
    value, grad = energy.value_and_grad(x)
    assert energy.rejected == 2 and (grad[1:3] == 0).all() and (grad[[0, 3]] != 0).any(2).all()
    alone = Evaluator(LennardJones()).value_and_grad(x[[0, 3]])  # a bad row leaves the others alone
    torch.testing.assert_close((value[[0, 3]], grad[[0, 3]]), alone)


def test_references_and_their_absence(monkeypatch, tmp_path):
    with pytest.raises(TiltflowError, match="no reference samples are called 'lj14'"):
        load_reference("lj14")
    monkeypatch.setattr("tiltflow.energies.reference.files", lambda package: tmp_path)
    with pytest.raises(TiltflowError, match="reinstall tiltflow"):
        ENERGY_PROBLEMS["lj55"]().reference()
    with pytest.raises(TiltflowError, match="not finite at 2 of 10"):
        virial(lambda x: torch.where(torch.arange(10) < 2, torch.nan, x.sum(1)), torch.ones(10, 2))
    with pytest.raises(TiltflowError, match="at least 2"):
        virial(lambda x: x.sum(1), torch.ones(1, 2))


# The evaluator


def well(x):
    return (x.square().sum(1) - 1) ** 2


class Springs:
    """A ForceProvider with a slip to order."""

    def __init__(self, sign=1.0):
        self.sign = sign

    def energy_and_forces(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            e = well(x)
            (g,) = torch.autograd.grad(e.sum(), x)
        return e.detach(), -self.sign * g


def test_evaluator_counts_rows_and_calls(generator):
    x = torch.randn(10, 2, generator=generator)
    energy = Evaluator(well, batch=4)
    value, grad = energy.value_and_grad(x)
    assert (energy.calls, energy.evaluations, energy.rejected) == (3, 10, 0)
    torch.testing.assert_close(value, well(x))
    torch.testing.assert_close(grad, 4 * (x.square().sum(1, keepdim=True) - 1) * x)
    assert not value.requires_grad and not grad.requires_grad
    torch.testing.assert_close(energy.value(x[:3]), value[:3])
    assert energy.value(x[:0]).shape == (0,) and energy.value_and_grad(x[:0])[1].shape == (0, 2)
    assert energy.report() == {"calls": 4, "evaluations": 13, "rejected": 0}
    resumed = Evaluator(well, budget=20)
    resumed.load_state_dict(energy.state_dict())
    assert resumed.report() == {"calls": 4, "evaluations": 13, "rejected": 0, "left": 7}
    with pytest.raises(TiltflowError, match="the state of an Evaluator has"):
        resumed.load_state_dict({"calls": 1})


@pytest.mark.parametrize("source", [well, Springs()])
def test_calling_it_is_differentiable_once_and_counted_once(source, generator):
    x = torch.randn(6, 2, generator=generator, requires_grad=True)
    weight = torch.randn(6, generator=generator)
    energy = Evaluator(source, batch=4)
    (got,) = torch.autograd.grad((weight * energy(x)).sum(), x)
    (exact,) = torch.autograd.grad((weight * well(x)).sum(), x)
    torch.testing.assert_close(got, exact)
    assert energy.evaluations == 6 and energy.calls == 2
    with torch.no_grad():
        assert not energy(x).requires_grad
    assert torch.autograd.gradcheck(lambda y: energy(y), x)


def test_force_providers_give_the_same_gradient_as_autograd(generator):
    assert isinstance(Springs(), ForceProvider) and not isinstance(well, ForceProvider)
    x = torch.randn(9, 2, generator=generator, dtype=torch.float32)
    exact, got, flipped = (Evaluator(e).value_and_grad(x) for e in (well, Springs(), Springs(-1.0)))
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(flipped[1], -exact[1])
    assert got[1].dtype == torch.float32


def test_budget_is_refused_before_it_is_spent(generator):
    x, seen = torch.randn(6, 2, generator=generator), []

    def counted(y):
        seen.append(len(y))
        return well(y)

    energy = Evaluator(counted, budget=10)
    energy.value(x)
    with pytest.raises(TiltflowError, match="10 energy evaluations does not suffice: 6 are used and 6 more"):
        energy.value_and_grad(x)
    assert seen == [6] and energy.evaluations == 6
    energy.value(x[:4])
    assert energy.report()["left"] == 0


def test_rejected_rows_and_too_many_of_them(generator):
    """Non-finite in energy or only in gradient; more than half of 8 is an error, half is not."""
    x = torch.arange(8.0)[:, None].expand(8, 2) + 0.1

    def bad_below(limit):
        return lambda y: y.sum(1) * torch.where(y[:, 0].detach() < limit, torch.nan, 1.0)

    energy = Evaluator(bad_below(4))
    value, grad = energy.value_and_grad(x)
    assert value[:4].isposinf().all() and (grad[:4] == 0).all() and (grad[4:] == 1).all() and energy.rejected == 4
    assert energy.value(x)[:4].isposinf().all() and energy.rejected == 8
    with pytest.raises(TiltflowError, match=r"5 of 8 rows, first at row 0, whose coordinates reach from 0\.1 to 0\.1"):
        Evaluator(bad_below(5)).value(x)
    assert Evaluator(bad_below(9)).value(x[:7]).isposinf().all()  # fewer than eight rows prove nothing
    cusp = Evaluator(lambda y: (y[:, 0] - 0.1).abs().sqrt() + 0 * y[:, 1])
    value, grad = cusp.value_and_grad(x)
    assert cusp.rejected == 1 and value[0].isposinf() and (grad[0] == 0).all()
    assert Evaluator(lambda y: -torch.inf * y[:, 0]).value(x[:2]).isposinf().all()  # a weight e^{−E} of 0, not of ∞


def test_cache_spares_identical_rows(generator):
    x = torch.randn(6, 2, generator=generator)
    energy, plain = Evaluator(well, cache=4), Evaluator(well)
    doubled = torch.cat([x, x[:2]])
    torch.testing.assert_close(energy.value_and_grad(doubled), plain.value_and_grad(doubled))
    assert (energy.evaluations, plain.evaluations) == (6, 8)
    energy.value(x[[0, 1, 5]])
    assert energy.evaluations == 6
    energy.value(x[:3])  # row 2 was the oldest but four
    assert energy.evaluations == 7
    energy.value_and_grad(x[[2]])  # its gradient was not asked for before
    assert energy.evaluations == 8
    energy.value_and_grad(x[[2]] + 1e-15)
    energy.value(x[[2]].float())
    assert energy.evaluations == 10


@pytest.mark.parametrize(
    "energy, x, message",
    [
        (well, [[0.0]], "got list"),
        (well, torch.zeros(3, 2, dtype=torch.long), "int64"),
        (well, torch.zeros(3, 2, dtype=torch.half), "float16"),
        (well, torch.zeros(3), r"\(B, \*event\)"),
        (lambda x: x, torch.zeros(3, 2), r"shape \(3, 2\) for a batch of 3"),
        (lambda x: x.sum(), torch.zeros(3, 2), r"shape \(\) for a batch"),
        (lambda x: x.sum(1).long(), torch.zeros(3, 2), "int64"),
        (lambda x: x.sum(1).tolist(), torch.zeros(3, 2), "list"),
        (lambda x: well(x.detach()), torch.zeros(3, 2), "detached"),
        (lambda x: torch.ones(3, requires_grad=True).exp(), torch.zeros(3, 2), "detached"),
    ],
)
def test_misuse_names_the_fault(energy, x, message):
    with pytest.raises(TiltflowError, match=message):
        Evaluator(energy).value_and_grad(x)


@pytest.mark.parametrize("limits", [{"batch": 0}, {"budget": -1}, {"cache": -1}])
def test_limits_must_make_sense(limits):
    with pytest.raises(TiltflowError, match="at least"):
        Evaluator(well, **limits)


def test_forces_of_the_wrong_shape_are_named():
    class Wrong:
        def energy_and_forces(self, x):
            return x.sum(1), x[:1]

    with pytest.raises(TiltflowError, match=r"forces of energy 'Wrong' returned .*\(1, 2\)"):
        Evaluator(Wrong()).value(torch.zeros(3, 2))


# OpenMM


def test_alanine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(TiltflowError, match="pip install openmm openmmtools"):
        ENERGY_PROBLEMS["alanine"]()


def test_alanine_forces_are_minus_the_gradient(generator):
    pytest.importorskip("openmm")
    testsystems = pytest.importorskip("openmmtools.testsystems")
    from openmm import unit

    from tiltflow.energies.alanine import PHI, PSI, OpenMMEnergy

    system = testsystems.AlanineDipeptideVacuum(constraints=None)
    atoms = list(system.topology.atoms())
    assert [atoms[i].name for i in PHI] == ["C", "N", "CA", "C"] and [atoms[i].name for i in PSI] == ["N", "CA", "C", "N"]
    problem = ENERGY_PROBLEMS["alanine"]()
    x = torch.from_numpy(system.positions.value_in_unit(unit.nanometer)).double()
    x = problem.geometry.wrap(x + 0.003 * torch.randn(4, 22, 3, generator=generator))
    evaluator = Evaluator(problem.energy)
    value, grad = evaluator.value_and_grad(x)
    d, h = torch.randn(x.shape, generator=generator), 1e-6
    difference = (evaluator.value(x + h * d) - evaluator.value(x - h * d)) / (2 * h)
    torch.testing.assert_close((grad * d).sum((1, 2)), difference, rtol=1e-5, atol=1e-4)
    warmer = OpenMMEnergy(system.system, temperature=600.0)
    torch.testing.assert_close(2 * warmer(x), value)
    assert Evaluator(problem.energy).value(torch.full((1, 22, 3), torch.nan)).isposinf().all()
    with pytest.raises(TiltflowError, match=r"takes \(B, 22, 3\), in nm"):
        problem.energy(x[:, :5])
    with pytest.raises(TiltflowError, match="constraints=None"):
        OpenMMEnergy(testsystems.AlanineDipeptideVacuum().system)
    with pytest.raises(TiltflowError, match="must be positive"):
        OpenMMEnergy(system.system, temperature=0.0)
