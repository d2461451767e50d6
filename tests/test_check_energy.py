"""check_energy: a good energy passes every line, each bad one fails the line that names its fault."""

import math

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Torus
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.energies.particles import LennardJones
from tiltflow.verdict.check_energy import check_energy

PARTICLES = Centred()
LJ13 = LennardJones()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=1_000, dtype=torch.float64):
    return ENERGY_PROBLEMS["lj13"]().reference()[:n].to(dtype)


def report_of(energy, x=None, seed=0, geometry=PARTICLES, **kw):
    return check_energy(energy, clusters() if x is None else x, geometry=geometry, generator=seeded(seed), **kw)


def status(report):
    return {line.name: line.status for line in report.lines}


def line_of(report, name):
    (line,) = (line for line in report.lines if line.name == name)
    return line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_good_particles_pass_every_line(dtype, seed):
    report = report_of(LJ13, clusters(4_000, dtype), seed, rotation=True, permutation=True, equilibrium=True)
    assert set(status(report).values()) == {"pass"} and report.status == "pass" and len(report.lines) == 19
    assert line_of(report, "gradient check").value < 1e-6 and "float64" in line_of(report, "gradient check").explanation
    assert "36" in line_of(report, "virial").explanation
    assert not any("reward" in line.explanation or "∇r" in line.explanation for line in report.lines)


@pytest.mark.parametrize("name", ["gmm9", "gaussian2d", "many-well", "ring"])
def test_good_vectors_pass(name):
    problem = ENERGY_PROBLEMS[name]()
    report = check_energy(problem.energy, problem.sample(2_000, seeded()), generator=seeded())
    assert {s for n, s in status(report).items() if n != "gradient tail"} == {"pass"}
    assert "translation" not in status(report) and "virial" not in status(report)


def test_a_short_reference_cannot_tell():
    assert line_of(report_of(LJ13, clusters(60), equilibrium=True), "virial").status == "cannot tell"


class Forces:
    """LJ13 as a ForceProvider, its forces multiplied by ``sign``."""

    def __init__(self, sign=1.0):
        self.sign = sign

    def energy_and_forces(self, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            e = LJ13(y)
            (g,) = torch.autograd.grad(e.sum(), y)
        return e.detach(), -self.sign * g


def near_the_first(x):
    return LJ13(x) + 5 * (x[:, 0] - x[:, 1]).norm(dim=1)


def nan_of_a_few(x):
    e = LJ13(x)
    return torch.where(e > -35, torch.nan, e)


def raises(x):
    raise KeyError("no such atom")


NOISE = torch.Generator().manual_seed(1)

BAD = {
    "detached": (lambda x: LJ13(x.detach()), "differentiable", "the energy is detached"),
    "flipped forces": (Forces(-1.0), "gradient check", "float64"),
    "half forces": (Forces(0.5), "gradient check", "float64"),
    "wrong factor": (lambda x: 2 * LJ13(x) - LJ13(x).detach(), "gradient check", "float64"),
    "nan": (nan_of_a_few, "finite value", "NaN"),
    "minus infinity": (lambda x: torch.where(LJ13(x) > -35, -torch.inf, LJ13(x)), "finite value", "−infinite"),
    "walls nearly everywhere": (lambda x: torch.where(LJ13(x) > -48, torch.inf, LJ13(x)), "finite value", "+infinite"),
    "gradient nan": (lambda x: LJ13(x) + (0 * x[:, 0, 0]).sqrt(), "finite gradient", "NaN or infinite"),
    "two axes": (lambda x: LJ13(x)[:, None], "output shape", "(32, 1)"),
    "one number": (lambda x: LJ13(x).sum(), "output shape", "()"),
    "noisy": (lambda x: LJ13(x) + torch.rand(len(x), generator=NOISE), "deterministic", "random"),
    "mixed rows": (lambda x: LJ13(x) - LJ13(x).mean(), "batch independent", "rows are mixed"),
    "constant": (lambda x: 0 * x.sum((1, 2)) + 3, "spread", "nothing to sample"),
    "field": (lambda x: LJ13(x) + x[..., 0].sum(1), "translation", "take the mean off"),
    "laboratory axes": (lambda x: LJ13(x) + x[..., 0].var(1), "rotation", "rotation=False"),
    "labelled": (near_the_first, "permutation", "permutation=False"),
    "raises": (raises, "output shape", "KeyError: 'no such atom'"),
    "pairs once": (LennardJones(depth=1.0), "virial", "27"),
    "kJ/mol": (lambda x: 2.494 * LJ13(x), "virial", "kJ/mol"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_energy_fails_its_line_and_is_named(name):
    energy, culprit, words = BAD[name]
    kw = {"equilibrium": True} if culprit == "virial" else {}
    report = report_of(energy, clusters(4_000 if kw else 1_000), rotation=True, permutation=True, **kw)
    assert report.status == "fail"
    failing = [line for line in report.lines if line.status == "fail"]
    assert failing[0].name == culprit and words in failing[0].explanation
    echoes = {"field": {"rotation"}, "constant": {"gradient norm"}}.get(name, set())
    assert {line.name for line in failing} <= {culprit} | echoes  # no line cries for another


def test_symmetries_are_demanded_asked_or_left_out():
    """True: fail; None: warn; False: no line. A chiral energy is not accused: only proper rotations are tried."""
    for option, expected in ((True, "fail"), (None, "warn"), (False, None)):
        assert status(report_of(near_the_first, permutation=option)).get("permutation") == expected

    def chiral(x):
        a, b, c = (x[:, i] - x[:, 3] for i in range(3))
        return LJ13(x) + torch.linalg.cross(a, b).mul(c).sum(1)

    assert status(report_of(chiral, rotation=True))["rotation"] == "pass"


def test_force_providers_are_checked_like_callables():
    assert status(report_of(Forces(), rotation=True, permutation=True)) == status(report_of(LJ13))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_periodicity_on_the_torus(seed):
    angles = 2 * math.pi * torch.rand(500, 3, generator=seeded(seed))

    def torsions(x):
        return (2 * x.cos() + (3 * x).sin()).sum(1)

    assert report_of(torsions, angles, seed, Torus()).status == "pass"
    for wrong in (lambda x: torsions(x) + 0.1 * x.square().sum(1), lambda x: (0.5 * x).cos().sum(1)):
        assert status(report_of(wrong, angles, seed, Torus()))["periodicity"] == "fail"


def test_walls_warn_and_the_rest_is_asked_of_the_finite_rows():
    x = clusters()
    x[::10, 1] = x[::10, 0]  # two particles in one place
    report = report_of(LJ13, x, rotation=True, permutation=True)
    assert line_of(report, "finite value").status == "warn" and line_of(report, "finite value").value == 100
    assert {s for n, s in status(report).items() if n != "finite value"} == {"pass"}


@pytest.mark.parametrize("factor", [1 / 38.7, 2625.5])
def test_energies_that_hardly_vary_or_explode_raise_the_question_of_units(factor):
    """Far too small, as in eV, and far too large."""
    line = line_of(report_of(lambda x: factor * LJ13(x)), "spread")
    assert line.status == "warn" and "kT" in line.explanation and ".02585 eV" in line.explanation
    assert line_of(report_of(LJ13), "spread").status == "pass"


def test_misuse_is_an_error_not_a_line():
    x = clusters(100)
    for samples, geometry, kw, message in (
        (x[:10], PARTICLES, {}, "at least 32"),
        (x / 0, PARTICLES, {}, "finite"),
        (x.long(), PARTICLES, {}, "floating point"),
        (x[:, 0], Euclidean(), {"rotation": True}, "only particles"),
        (x[:, 0], Torus(), {"equilibrium": True}, "does not hold on a torus"),
        (x[:, 0], PARTICLES, {}, r"shape \(N, m\)"),
    ):
        with pytest.raises(TiltflowError, match=message):
            report_of(LJ13, samples, geometry=geometry, **kw)
