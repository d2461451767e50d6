"""MALA and parallel tempering leave e^{−E} invariant: closed forms with error bars on several seeds, and known-bad twins."""

import math

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Torus
from tiltflow.energies import ENERGY_PROBLEMS, mcmc
from tiltflow.energies.mcmc import mala, parallel_tempering

PRECISION = torch.tensor([1.0, 4.0], dtype=torch.float64)
CENTRES = torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)


def gaussian(x):
    return 0.5 * (PRECISION * x**2).sum(1)


def mixture(x):
    """Two modes six standard deviations apart."""
    square = (x[:, None] - CENTRES).square().sum(-1)
    return -torch.logsumexp(WEIGHTS.log() - 0.5 * square, 1)


def variance_errors(seed, moves=40, n=4000):
    """Of a chain that starts in equilibrium, in standard errors: (2,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator) / PRECISION.sqrt()
    x = mala(gaussian, x, 0.25, moves, generator).x
    return (x.var(0) * PRECISION - 1) / (2 / n) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mala_keeps_a_gaussian(seed):
    assert float(variance_errors(seed).abs().max()) < 3.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rise, forth, back: torch.zeros_like(rise),  # no Metropolis correction
        lambda rise, forth, back: -rise,  # no proposal ratio
        lambda rise, forth, back: -rise + 0.5 * (back.square() - forth.square()).flatten(1).sum(1),  # upside down
    ],
)
def test_wrong_acceptance_does_not(wrong, monkeypatch):
    monkeypatch.setattr(mcmc, "_log_ratio", wrong)
    assert all(float(variance_errors(seed).abs().max()) > 5 for seed in (0, 1, 2))


def test_mala_reports_acceptance_and_evaluations(generator):
    x = torch.randn(500, 2, generator=generator) / PRECISION.sqrt()
    small, large = mala(gaussian, x, 1e-3, 10, generator), mala(gaussian, x, 0.8, 10, generator)
    assert small.acceptance > 0.98 > 0.8 > large.acceptance > 0
    assert small.evaluations == 11 * 500
    calls = []
    mala(lambda v: (calls.append(len(v)), gaussian(v))[1], x, 0.1, 7, generator)
    assert sum(calls) == mala(gaussian, x, 0.1, 7, generator).evaluations


def test_mala_from_far_away_reaches_the_gaussian(generator):
    x = mala(gaussian, 5 + torch.zeros(3000, 2), 0.3, 60, generator).x
    assert float(x.mean(0).abs().max()) < 0.1
    torch.testing.assert_close(x.var(0), 1 / PRECISION, atol=0, rtol=0.12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parallel_tempering_finds_the_weights_of_two_modes(seed):
    generator, start = torch.Generator().manual_seed(seed), CENTRES[1:].repeat(48, 1)  # all in the lighter mode
    out = parallel_tempering(mixture, start, [1, 2, 4, 8], 1500, generator, burn_in=400, thin=10, step=0.5)
    share = (out.samples[..., 0] < 0).double().mean(0)  # of each chain
    assert abs(float(share.mean()) - 0.7) < 4 * float(share.std()) / 48**0.5 < 0.12
    right = out.samples[out.samples[..., 0] < 0]
    torch.testing.assert_close(right.var(0), torch.ones(2), atol=0.12, rtol=0)
    assert out.samples.shape == (150, 48, 2) and out.energies.shape == (150, 4, 48)
    torch.testing.assert_close(mixture(out.samples.flatten(0, 1)), out.energies[:, 0].flatten())
    assert bool(((out.acceptance - 0.574).abs() < 0.12).all()) and bool((out.swaps > 0.3).all())
    assert bool((out.step.diff() > 0).all())  # hotter moves are larger
    assert out.evaluations == (1500 + 400 + 1) * 4 * 48 and out.seconds > 0


def test_without_a_ladder_the_other_mode_is_not_found(generator):
    start = CENTRES[1:].repeat(48, 1)
    alone = parallel_tempering(mixture, start, [1], 400, generator, burn_in=100, thin=10, step=0.5)
    assert float((alone.samples[..., 0] < 0).double().mean()) < 0.3 and len(alone.swaps) == 0


def test_swaps_keep_both_temperatures(generator):
    n, beta = 20_000, torch.tensor([1.0, 0.25])
    x = torch.randn(2, n, 1, generator=generator) / beta.sqrt()[:, None, None]
    state = mcmc._State(x, 0.5 * x.square().sum(2), x)
    swapped, low, share = mcmc._swap(state, beta, 0, generator)
    torch.testing.assert_close(swapped.x.square().mean((1, 2)), 1 / beta, atol=0, rtol=0.05)
    torch.testing.assert_close(swapped.energy, 0.5 * swapped.x.square().sum(2))
    assert low.tolist() == [0] and 0.3 < float(share) < 0.9
    wrong = mcmc._swap(state._replace(energy=-state.energy), beta, 0, generator)[0]  # the ratio upside down
    assert float(wrong.x[0].square().mean()) > 1.5
    assert len(mcmc._swap(state, beta, 1, generator)[1]) == 0  # nobody above the upper replica


def test_parallel_tempering_is_reproducible():
    def once():
        generator = torch.Generator().manual_seed(5)
        return parallel_tempering(mixture, CENTRES, [1, 3], 20, generator, burn_in=5, thin=5).samples

    assert torch.equal(once(), once())


def spring(x):
    return 0.5 * x.square().sum((1, 2))


def test_centred_particles_stay_centred_and_have_fewer_dimensions(generator):
    x = mala(spring, torch.randn(4000, 4, 2, generator=generator), 0.3, 40, generator, Centred()).x
    assert float(x.mean(1).abs().max()) < 1e-12
    error = (2 * 6 / 4000) ** 0.5
    assert abs(float(2 * spring(x).mean()) - 6) < 4 * error
    free = mala(spring, x, 0.3, 40, generator).x  # the other geometry: eight
    assert float(2 * spring(free).mean()) > 6 + 8 * error and float(free.mean(1).abs().max()) > 0.1


def test_parallel_tempering_of_dw4_agrees_with_its_reference(generator):
    problem = ENERGY_PROBLEMS["dw4"]()
    reference = problem.reference().double()
    plan = {"burn_in": 300, "thin": 10, "step": 1e-3, "geometry": Centred()}
    out = parallel_tempering(problem.energy, reference[:64], [1, 2, 4], 1000, generator, **plan)
    assert float(out.samples.mean(2).abs().max()) < 1e-12
    means = out.energies[:, 0].mean(0)  # of each chain
    assert abs(float(means.mean() - problem.energy(reference).mean())) < 4 * float(means.std()) / 8 + 0.1


def test_the_torus_is_sampled_exactly(generator):
    def energy(phi):
        return -phi.cos().sum(1)  # von Mises, concentration 1

    x = mala(energy, 40 * torch.rand(4000, 1, generator=generator), 1.0, 60, generator, Torus()).x
    assert float(x.abs().max()) <= math.pi
    exact = float(torch.special.i1(torch.tensor(1.0)) / torch.special.i0(torch.tensor(1.0)))
    assert abs(float(x.cos().mean()) - exact) < 4 * float(x.cos().std()) / 4000**0.5


def test_infinite_and_undefined_proposals_are_refused(generator):
    def half_line(x):  # exponential law on x > 0
        return torch.where(x > 0, x, torch.full_like(x, math.nan)).sum(1)

    x = mala(half_line, torch.ones(4000, 1), 0.2, 150, generator).x
    assert float(x.min()) > 0 and float(x.mean()) == pytest.approx(1, abs=0.08)


def test_bad_input_is_named(generator):
    x = torch.ones(3, 2)
    with pytest.raises(TiltflowError, match=r"must return floats of shape \(3,\)"):
        mala(lambda v: gaussian(v).sum(), x, 0.1, 1, generator)
    with pytest.raises(TiltflowError, match="3 of 3 starting points"):
        mala(lambda v: gaussian(v) + math.inf, x, 0.1, 1, generator)
    with pytest.raises(TiltflowError, match="positive, got 0"):
        mala(gaussian, x, 0, 1, generator)
    for ladder in ([], [2, 1], [0, 1]):
        with pytest.raises(TiltflowError, match="ascend"):
            parallel_tempering(gaussian, x, ladder, 10, generator, burn_in=0, thin=1)
    with pytest.raises(TiltflowError, match="thin=20"):
        parallel_tempering(gaussian, x, [1], 10, generator, burn_in=0, thin=20)
