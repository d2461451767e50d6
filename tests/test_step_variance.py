"""Moment-matched steps: exact weights with any step variance, and fewer steps for the same effective sample size."""

import pytest
import torch
from test_adjoint_sampling import FINEST, MIXTURE, Exact, cost_of

from tiltflow.core.brownian import geometric_chain
from tiltflow.core.chain import at
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.geometry import Centred, Euclidean
from tiltflow.core.simulate import sample, walk
from tiltflow.core.value import reversed_log_ratio
from tiltflow.core.weights import evidence
from tiltflow.methods.step_variance import update_step_variance

STEPS = 12


class Grid(Exact):
    """The exact drift on a chain of few steps."""

    def forward(self, x, t):
        k = (t * STEPS).round().long()
        return self.drift(x, k) * at((self.chain.remaining + self.finest**2).sqrt(), k, x)


def matched(generator, rounds=60):
    chain = geometric_chain(Euclidean(), (2,), STEPS, 2.0, FINEST)
    control = DriftControl(StepVariance(Grid(chain, FINEST), STEPS), FINEST)
    for _ in range(rounds):
        x1 = MIXTURE.sample(2_000, generator)
        update_step_variance(control, chain, x1, torch.ones(len(x1)), generator)
    return chain, control


@pytest.fixture(params=[0, 1])
def generator(request):
    return torch.Generator().manual_seed(request.param)


def test_it_starts_as_the_base(generator):
    chain = geometric_chain(Euclidean(), (2,), STEPS, 2.0, FINEST)
    control = DriftControl(StepVariance(torch.nn.Identity(), STEPS), FINEST)
    ratios = control.ratios(chain)
    assert torch.allclose(ratios, torch.ones(STEPS, dtype=torch.float64))
    assert DriftControl(torch.nn.Identity(), FINEST).ratios(chain) is None


def test_the_exact_variance_is_found(generator):
    """v_k of the mixture: E Var(X_1|X_k) by Monte Carlo over fresh bridges."""
    chain, control = matched(generator)
    x1 = MIXTURE.sample(50_000, generator)
    for k in (0, 4, 9):
        rows = torch.full((len(x1),), k)
        x, _ = chain.bridge(rows, torch.zeros_like(x1), x1, generator)
        error = (x1 - x - float(chain.remaining[k]) * control.drift(chain, rows, x)) ** 2
        assert float(control.module.share[k] * chain.remaining[k]) == pytest.approx(float(error.mean()), rel=0.08)


def test_fewer_steps_for_the_same_effective_sample_size(generator):
    chain, control = matched(generator)
    plain = DriftControl(Grid(chain, FINEST), FINEST)
    found = {}
    for name, c in (("matched", control), ("plain", plain)):
        drawn = sample(chain, c, chain.source(20_000, generator), generator)
        found[name] = evidence(drawn.log_ratio - cost_of(chain).value(drawn.x))
        assert abs(found[name].log_z) < 4.5 * found[name].log_z_error  # unbiased with either variance
    assert found["matched"].ess > 0.88 > 0.7 > found["plain"].ess
    assert found["matched"].elbo > 0.3 * found["plain"].elbo


def test_dropping_the_normalisation_of_the_ratio_biases_log_z(generator):
    """Known-bad twin: log ρ left out of the transition's log-ratio."""
    chain, control = matched(generator)
    x, log_ratio = chain.source(20_000, generator), torch.zeros(20_000)
    for s in walk(chain, control, x, generator, with_base=True):
        log_ratio += s.log_ratio(0)  # d = 0 drops d log ρ
        x = s.x_next
    assert abs(evidence(log_ratio - cost_of(chain).value(x)).log_z) > 0.5


def test_reversed_paths_use_the_same_transitions(generator):
    chain, control = matched(generator)
    x1 = MIXTURE.sample(20_000, generator)
    log_w = reversed_log_ratio(chain, control, x1, generator) - cost_of(chain).value(x1)
    found = evidence(-log_w)
    assert abs(found.log_z) < 4.5 * found.log_z_error and found.ess > 0.85


def test_particles_count_their_own_dimension(generator):
    """Any ρ on centred particles: E e^{log ratio} = 1 under the control's paths."""
    chain = geometric_chain(Centred(), (3, 2), 6, 1.0, 0.3)
    control = DriftControl(StepVariance(_Zero(), 6), 0.3)
    control.module.share.mul_(0.8)
    drawn = sample(chain, control, chain.source(40_000, generator), generator)
    found = evidence(drawn.log_ratio)
    assert abs(found.log_z) < 4.5 * found.log_z_error and found.ess > 0.5
    error = float(drawn.log_ratio.std()) / 200
    assert float(drawn.kl.mean()) == pytest.approx(-float(drawn.log_ratio.mean()), abs=4 * error)


class _Zero(torch.nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)
