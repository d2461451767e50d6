"""train_sampler end to end: exact drifts, mode weights, log Z, every method through one protocol, exact resume."""

from dataclasses import replace

import pytest
import torch

from tiltflow.core.chain import at
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import evidence
from tiltflow.energies import ENERGY_PROBLEMS, EnergyProblem, Evaluator
from tiltflow.methods.registry import METHODS, names
from tiltflow.metrics.distance import total_variation
from tiltflow.metrics.sampling import mode_weights
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.train import train_sampler, untrained

TINY = SamplerSettings(rounds=3, batch=64, minibatch=64, gradient_steps=3, steps=8, hidden=16, layers=2)


def tiny(method, **changes):
    """TINY as the method wants it: methods on policy use a round once."""
    once = {"gradient_steps": 1, "minibatch": None, "buffer_rounds": 1} if METHODS[method].on_policy else {}
    return replace(TINY, **(changes | once))


def gaussian():
    """N((.5, −.3), .6² I): the exact drift is linear in x."""
    mean = torch.tensor([0.5, -0.3])

    def energy(x):
        return 0.5 * ((x - mean.to(x)) / 0.6).square().sum(1)

    return EnergyProblem(name="gaussian", energy=energy, event_shape=(2,), scale=1.5, finest=0.1)


@pytest.mark.parametrize(
    "method", [pytest.param("adjoint_sampling", marks=pytest.mark.slow), "weighted_adjoint_sampling"]
)
def test_a_gaussian_is_learned_with_its_exact_drift_and_log_z(method):
    """The Föllmer drift of N(m, s²I) over N(0, h²I): b = (m − x + …), linear; log Z = log 2πs²."""
    settings = SamplerSettings(
        rounds=60, batch=256, minibatch=256, gradient_steps=30, steps=25, hidden=32, learning_rate=3e-3
    )
    trained = train_sampler(gaussian(), method, settings)
    chain, s2, h2, m = trained.chain, 0.36, trained.chain.end_variance, torch.tensor([0.5, -0.3])
    generator = torch.Generator().manual_seed(9)
    x1 = m + 0.6 * torch.randn(4_000, 2, generator=generator)
    k = torch.randint(1, len(chain.std), (len(x1),), generator=generator)
    x, _ = chain.bridge(k, torch.zeros_like(x1), x1, generator)
    zeta = at(chain.zeta, k, x)
    variance = zeta**2 * s2 + zeta * (1 - zeta) * h2
    exact = -(x - zeta * m) / variance + x / (h2 * zeta)
    with torch.no_grad():
        error = (trained.control.drift(chain, k, x) - exact) * at((chain.remaining + 0.01).sqrt(), k, x)
    size = (exact * at((chain.remaining + 0.01).sqrt(), k, x)).square().mean()
    assert float(error.square().mean()) < 0.02 * float(size)
    found = evidence(trained.sample(20_000).log_weights)
    assert abs(found.log_z - float(torch.log(torch.tensor(2 * torch.pi * s2)))) < 0.02
    assert found.ess > 0.8


@pytest.mark.slow
def test_mode_weights_need_path_weights():
    """Modes 7.5 standard deviations apart, weights .7/.3: right with path weights, not without (the known-bad twin)."""
    problem = ENERGY_PROBLEMS["unequal2d"]()
    settings = SamplerSettings(rounds=40, gradient_steps=50, steps=30)
    tv = {}
    for method in ("weighted_adjoint_sampling", "adjoint_sampling"):
        drawn = train_sampler(problem, method, settings).sample(10_000)
        tv[method] = total_variation(mode_weights(drawn.x, problem.modes.centres), problem.modes.weights)
    assert tv["weighted_adjoint_sampling"] < 0.03 < 0.1 < tv["adjoint_sampling"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_unequal_mode_weights_on_five_seeds(seed):
    problem = ENERGY_PROBLEMS["unequal2d"]()
    drawn = train_sampler(problem, settings=SamplerSettings(rounds=100, steps=40), seed=seed).sample(10_000)
    assert total_variation(mode_weights(drawn.x, problem.modes.centres), problem.modes.weights) <= 0.03
    assert abs(evidence(drawn.log_weights).log_z) < 0.02


@pytest.mark.parametrize("method", names("sample", trained=True))
@pytest.mark.parametrize("name", ["gaussian2d", "dw4"])
def test_every_method_runs_through_one_protocol(method, name):
    problem = ENERGY_PROBLEMS[name]()
    before, _ = untrained(problem, METHODS[method], tiny(method))
    after = train_sampler(problem, method, tiny(method))
    old, new = before.control.module.state_dict(), after.control.module.state_dict()
    assert old.keys() == new.keys() and any(not torch.equal(old[key], new[key]) for key in old)
    assert len(after.history) == 3 and after.energy.calls >= 3
    drawn = after.sample(50)
    assert drawn.x.shape == (50, *problem.event_shape) and bool(torch.isfinite(drawn.x).all())
    assert (drawn.log_weights is None) == (method in ("asbs", "bridge_matching", "idem"))


@pytest.mark.parametrize("method", ["weighted_adjoint_sampling", "asbs", "bridge_matching", "idem", "pis", "log_variance"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    problem, settings = gaussian(), tiny(method, rounds=12)  # the checkpoint is written at 10
    whole = train_sampler(problem, method, settings)

    def interrupt(row):
        if row["iteration"] == 10:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train_sampler(problem, method, settings, checkpoint=tmp_path / "c.safetensors", callback=interrupt)
    again = train_sampler(problem, method, settings, checkpoint=tmp_path / "c.safetensors", resume=True)
    for name, value in whole.control.module.state_dict().items():
        assert torch.equal(value, again.control.module.state_dict()[name]), name
    assert whole.energy.report() == again.energy.report()
    assert torch.equal(whole.sample(20).x, again.sample(20).x)


def test_energy_calls_per_gradient_step_are_few_and_counted_by_the_library():
    settings = SamplerSettings()
    assert settings.batch / (settings.gradient_steps * settings.minibatch) <= 0.05  # rows of energy per row of training
    trained = train_sampler(gaussian(), settings=replace(TINY, gradient_steps=25))
    assert trained.energy.calls / (3 * 25) <= 0.05 and trained.energy.evaluations == 3 * 64


def test_the_sign_flipped_twin_climbs_the_energy():
    problem = gaussian()
    flipped = replace(problem, energy=lambda x: -problem.energy(x).clamp_max(8.0))
    settings = replace(TINY, rounds=30, gradient_steps=20)
    right, wrong = (train_sampler(p, "adjoint_sampling", settings).sample(500).x for p in (problem, flipped))
    assert float(problem.energy(right).mean()) < 2.0 < float(problem.energy(wrong).mean())


@pytest.mark.parametrize("name", ["unequal2d", "dw4"])
def test_constant_noise_and_a_network_of_ones_own(name):
    problem = ENERGY_PROBLEMS[name]()
    first = train_sampler(problem, settings=replace(TINY, noise="constant"))
    assert torch.allclose(first.chain.std, first.chain.std[:1].expand(200))

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return self.gain * x

    own = train_sampler(problem, settings=TINY, net=Twice())
    assert float(own.control.module.net.gain.detach()) != 0


def test_misuse():
    with pytest.raises(TiltflowError, match="noise must be one of geometric, constant, got 'pink'"):
        replace(TINY, noise="pink")
    with pytest.raises(TiltflowError, match="unknown method 'magic'; use one of log_variance, weighted_adjoint_sampling"):
        train_sampler(gaussian(), "magic")
    with pytest.raises(TiltflowError, match="'draft_1' tilts a base towards a reward: use finetune"):
        train_sampler(gaussian(), "draft_1")
    with pytest.raises(TiltflowError, match="'pis' uses each round once"):
        train_sampler(gaussian(), "pis", TINY)
    with pytest.raises(TiltflowError, match="budget"):
        train_sampler(gaussian(), settings=TINY, energy=Evaluator(gaussian().energy, budget=100))
