"""Adjoint Sampling and its relatives against closed forms: drift, target family, weights, log Z from both sides."""

from dataclasses import replace

import pytest
import torch

from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.brownian import BrownianChain, OrnsteinUhlenbeckChain, constant_chain, geometric_chain
from tiltflow.core.chain import at
from tiltflow.core.control import DriftControl
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Torus, noise
from tiltflow.core.simulate import event_sum, sample, simulate
from tiltflow.core.value import reversed_log_ratio
from tiltflow.core.weights import evidence
from tiltflow.energies import Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.methods.bridge_sampling import AdjointBridgeSampling, DampedBridgeMatching
from tiltflow.methods.idem import IteratedDenoising
from tiltflow.problems.tilt import GaussianMixture
from tiltflow.train.method import State

STEPS, SCALE, FINEST = 60, 2.0, 0.1
MIXTURE = GaussianMixture.isotropic([0.7, 0.3], [[1.0, 0.5], [-1.0, -0.5]], 0.6)


class Exact(torch.nn.Module):
    """The exact drift −∇V of a mixture target over a Brownian base, as a DriftControl's network."""

    def __init__(self, chain, finest, mixture=MIXTURE):
        super().__init__()
        self.chain, self.finest, self.mixture = chain, finest, mixture

    def drift(self, x, k):
        """∇log ∫ p*(x1)/p_base(x1) N(x1; x, rest) dx1: the noised tilt's score minus the base's."""
        h2, zeta = self.chain.end_variance, at(self.chain.zeta, k, x).reshape(-1, 1)
        zeta = zeta.clamp_min(1e-9)
        spread = (h2 * zeta * (1 - zeta)).sqrt()
        cov = zeta[:, :, None] ** 2 * self.mixture.covariances.to(x)[0] + spread[:, :, None] ** 2 * torch.eye(2).to(x)
        z = x[:, None] - zeta[:, :, None] * self.mixture.means.to(x)
        pull = -torch.linalg.solve(cov[:, None].expand(-1, 2, -1, -1), z[..., None])[..., 0]
        log_p = 0.5 * (z * pull).sum(-1) + self.mixture.weights.to(x).log()
        return (torch.softmax(log_p, 1)[..., None] * pull).sum(1) + x / (h2 * zeta)

    def forward(self, x, t):
        k = (t * STEPS).round().long()
        return self.drift(x, k) * at((self.chain.remaining + self.finest**2).sqrt(), k, x)


def chain_of(**changes):
    return geometric_chain(Euclidean(), (2,), STEPS, SCALE, FINEST, **changes)


def cost_of(chain, **changes):
    return EnergyCost(Evaluator(lambda x: -MIXTURE.log_prob(x)), chain, **changes)


def optimal(chain):
    return DriftControl(Exact(chain, FINEST), FINEST)


@pytest.fixture(params=[0, 1, 2])
def generator(request):
    return torch.Generator().manual_seed(request.param)


def test_geometric_noise_shrinks_what_is_left_by_one_factor_per_step():
    chain = chain_of()
    left = chain.remaining + FINEST**2
    assert torch.allclose(left[1:] / left[:-1], left[1] / left[0])
    assert chain.end_variance == pytest.approx(SCALE**2 - FINEST**2)
    assert torch.allclose(constant_chain(Euclidean(), (2,), 4, 2.0).std, torch.full((4,), 1.0, dtype=torch.float64))


def test_the_bridge_has_the_stated_law(generator):
    chain = chain_of()
    k = torch.full((40_000,), 7)
    x0, x1 = torch.ones(40_000, 2), torch.full((40_000, 2), 3.0)
    x, _ = chain.bridge(k, x0, x1, generator)
    zeta = float(chain.zeta[7])
    variance = chain.end_variance * zeta * (1 - zeta)
    assert float((x.mean(0) - (1 + 2 * zeta)).abs().max()) < 4 * (variance / 40_000) ** 0.5
    assert float((x.var(0) - variance).abs().max()) < 5 * variance * (2 / 40_000) ** 0.5


@pytest.mark.parametrize("target", ["adjoint", "bridge", "least_variance"])
def test_every_target_of_the_family_has_the_exact_drift_as_its_mean(target, generator):
    """Regress target − exact drift on features of x at p*: nothing is left. The base's score dropped leaves much."""
    chain = chain_of()
    x1 = MIXTURE.sample(200_000, generator)
    grad = -MIXTURE.score(x1)
    fisher = torch.full((len(x1),), float((grad**2).sum(1).mean()) / 2)
    method = AdjointSampling(chain, cost_of(chain), target=target)
    x, k, drift = method.project({"x1": x1, "grad": grad, "fisher": fisher}, generator)
    late = (k > 5) & (k < 45)
    x, k, drift = x[late], k[late], drift[late]
    exact = Exact(chain, FINEST).drift(x, k)

    def worst(error):
        features = torch.cat([torch.ones(len(x), 1), x, x.square(), (2 * x).sin()], 1)
        z = (features[:, :, None] * error[:, None, :]).flatten(1)
        return float((z.mean(0) / (z.std(0) / len(z) ** 0.5)).abs().max())

    assert worst(drift - exact) < 4.5
    assert worst(drift + x1[late] / chain.end_variance - exact) > 20  # as if ∇log p_1^base were counted twice


def test_the_least_variance_gain_has_the_least_variance(generator):
    chain = chain_of()
    x1 = MIXTURE.sample(50_000, generator)
    grad = -MIXTURE.score(x1)
    fisher = torch.full((len(x1),), float((grad**2).sum(1).mean()) / 2)
    spread = {}
    for target in ("adjoint", "bridge", "least_variance"):
        method = AdjointSampling(chain, cost_of(chain), target=target)
        same = torch.Generator().manual_seed(3)
        x, k, drift = method.project({"x1": x1, "grad": grad, "fisher": fisher}, same)
        error = event_sum((drift - Exact(chain, FINEST).drift(x, k.clamp_min(1))) ** 2) * (k > 0)
        spread[target] = torch.stack([error[k == j].mean() for j in range(1, STEPS)])
    best = torch.minimum(spread["adjoint"], spread["bridge"])
    assert bool((spread["least_variance"] < 1.05 * best).all())
    assert float(spread["least_variance"].sum()) < 0.8 * float(best.sum())


def test_the_lean_adjoint_is_constant_along_a_drift_free_base(generator):
    chain = chain_of()
    path = simulate(chain, None, torch.zeros(3, 2), generator)
    adjoint = lean_adjoint(chain, path, cost_of(chain))
    assert torch.equal(adjoint.a, adjoint.a[-1:].expand_as(adjoint.a)) and bool(adjoint.a.any())


def test_the_exact_control_has_equal_weights_and_log_z_zero(generator):
    """Up to the step size; its known-bad twin, the sign flipped, has weights all over the place."""
    chain = chain_of()
    cost = cost_of(chain)
    drawn = sample(chain, optimal(chain), chain.source(8_000, generator), generator)
    log_w = drawn.log_ratio - cost.value(drawn.x)
    found = evidence(log_w)
    assert abs(found.log_z) < 4 * found.log_z_error + 0.002
    assert found.ess > 0.85
    share = float((MIXTURE.component(drawn.x) == 0).float().mean())
    assert abs(share - 0.7) < 0.03
    twin = DriftControl(_Flipped(Exact(chain, FINEST)), FINEST)
    wrong = sample(chain, twin, chain.source(8_000, generator), generator)
    assert evidence(wrong.log_ratio - cost.value(wrong.x)).ess < 0.1


class _Flipped(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return -self.net(x, t)


def test_reversed_paths_bound_log_z_from_above(generator):
    """ELBO ≤ log Z ≤ EUBO for a poor control, and both estimates of log Z = 0 agree."""
    chain = chain_of()
    cost, control = cost_of(chain), optimal(chain)
    half = DriftControl(_Scaled(control.module, 0.7), FINEST)
    x1 = MIXTURE.sample(8_000, generator)
    forward = reversed_log_ratio(chain, half, x1, generator) - cost.value(x1)
    drawn = sample(chain, half, chain.source(8_000, generator), generator)
    reverse = evidence(drawn.log_ratio - cost.value(drawn.x))
    assert reverse.elbo < -0.02 and float(forward.mean()) > 0.02
    inverse = evidence(-forward)
    assert abs(inverse.log_z) < 4 * inverse.log_z_error and abs(reverse.log_z) < 4 * reverse.log_z_error


class _Scaled(torch.nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x, t):
        return self.factor * self.net(x, t)


def test_collect_stores_gradients_weights_and_counts_calls(generator):
    chain = chain_of()
    cost = cost_of(chain, max_grad_norm=0.5)
    method = AdjointSampling(chain, cost, batch=64, minimum_ess=0.5)
    got = method.collect(State(optimal(chain), generator))
    rows = got.material
    exact = -MIXTURE.score(rows["x1"])
    clipped = exact * (0.5 / exact.norm(dim=1, keepdim=True)).clamp_max(1.0)
    assert torch.allclose(rows["grad"], clipped, atol=1e-5)
    assert float(rows["weight"].mean()) == pytest.approx(1.0, abs=1e-5)
    assert cost.energy.calls == 1 and got.metrics["energy_calls"] == 1


def test_temperature_divides_the_energy(generator):
    chain = chain_of()
    hot = replace(cost_of(chain), temperature=4.0)
    x = torch.randn(5, 2, generator=generator)
    assert torch.allclose(hot.grad(x), -MIXTURE.score(x) / 4 - x / chain.end_variance, atol=1e-5)


def test_rejected_energies_carry_no_weight(generator):
    chain = chain_of()
    energy = Evaluator(lambda x: torch.where(x[:, 0] > 1.5, torch.nan, x.square().sum(1)))
    method = AdjointSampling(chain, EnergyCost(energy, chain), batch=400, minimum_ess=0.3)
    rows = method.collect(State(optimal(chain), generator)).material
    beyond = rows["x1"][:, 0] > 1.5
    assert bool(beyond.any()) and float(rows["weight"][beyond].abs().max()) == 0.0
    assert bool(torch.isfinite(rows["grad"]).all()) and energy.rejected == int(beyond.sum())


@pytest.mark.parametrize("target", ["adjoint", "least_variance"])
def test_asbs_from_a_point_is_adjoint_sampling(generator, target):
    """From X_0 = 0 the corrector's regression target is ∇log p_1^base, and with it the loss is Adjoint Sampling's."""
    chain = chain_of()
    cost = cost_of(chain)

    class BaseScore(torch.nn.Module):
        def forward(self, x, t):
            return -x / chain.end_variance**0.5

    asbs = AdjointBridgeSampling(chain, cost, BaseScore(), batch=128, target=target)
    rows = asbs.collect(State(optimal(chain), generator)).material
    got = asbs.loss(optimal(chain), rows, torch.Generator().manual_seed(4))
    expected, other = (
        float(AdjointSampling(chain, cost, target=name).loss(optimal(chain), rows, torch.Generator().manual_seed(4)))
        for name in (target, "bridge")
    )
    assert float(got) == pytest.approx(expected, rel=1e-5) and float(got) != pytest.approx(other, rel=1e-2)


def test_asbs_bounds_gradients_by_the_iteration(generator):
    chain = chain_of()
    method = AdjointBridgeSampling(chain, cost_of(chain), torch.nn.Identity(), batch=64, bound=lambda i: 0.5 * (i + 1))
    for iteration in (0, 3):
        rows = method.collect(State(optimal(chain), generator, iteration)).material
        assert float(rows["grad"].norm(dim=1).max()) == pytest.approx(0.5 * (iteration + 1), rel=1e-5)


def test_bridge_matching_of_exact_end_points_is_still_at_its_fixed_point(generator):
    """From a Gaussian source with a Gaussian target: the regression target's mean is the mixture of bridges' exact drift."""
    s2 = 0.8**2

    def initial(n, g):
        return 0.8 * torch.randn(n, 2, generator=g)

    chain = chain_of(initial=initial)
    target = GaussianMixture.isotropic([1.0], [[0.4, -0.2]], 0.5)
    cost = EnergyCost(Evaluator(lambda x: -target.log_prob(x)), chain)
    control = DriftControl(_Scaled(Exact(chain, FINEST), 0.0), FINEST)
    method = DampedBridgeMatching(chain, cost, control, damping=1.0)
    x1 = target.sample(300_000, generator)
    grad = -target.score(x1)
    rows = {
        "x1": x1, "grad": grad, "weight": torch.ones(len(x1)), "fisher": torch.full((len(x1),), 1 / 0.25),
    }  # fmt: skip
    h2, c, m = chain.end_variance, 0.25, torch.tensor([0.4, -0.2])

    class Bridge(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor(shift))

        def forward(self, x, t):
            k = (t * STEPS).round().long()
            zeta = at(chain.zeta, k, x)
            variance = (1 - zeta) ** 2 * s2 + zeta**2 * c + h2 * zeta * (1 - zeta)
            gain = (zeta * c + h2 * zeta * (1 - zeta) * 0 - (1 - zeta) * s2) / variance  # Cov(X_1 − X_0, X_t)
            noise_gain = h2 * zeta * (1 - zeta) / variance
            residual = x - zeta * m
            drift = (m + gain * residual) / h2 - noise_gain * residual / (h2 * (1 - zeta))
            return (1 + self.shift) * drift * at((chain.remaining + FINEST**2).sqrt(), k, x)

    slopes = []
    for _ in range(4):
        net = Bridge(0.0)
        method.loss(DriftControl(net, FINEST), rows, generator).backward()
        slopes.append(float(net.shift.grad))
    twin = Bridge(-0.2)  # the gradient is not zero away from the fixed point
    method.loss(DriftControl(twin, FINEST), rows, generator).backward()
    assert abs(sum(slopes) / 4) < 0.05 * abs(float(twin.shift.grad)) + 4 * torch.tensor(slopes).std() / 2


def test_idem_estimates_the_noised_score(generator):
    chain = chain_of(initial=lambda n, g: SCALE * torch.randn(n, 2, generator=g))
    method = IteratedDenoising(chain, cost_of(chain), FINEST, draws=4_000)
    x, tau = 0.7 * torch.randn(20, 2, generator=generator), torch.full((20, 1), 0.5)
    noised = GaussianMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances + 0.25 * torch.eye(2, dtype=torch.float64))
    assert float((method.score(x, tau, generator) - noised.score(x)).abs().max()) < 0.25
    with pytest.raises(TiltflowError, match="source"):
        IteratedDenoising(chain_of(), cost_of(chain_of()), FINEST)


def test_the_stationary_base_keeps_its_law_and_counts_log_z(generator):
    chain = OrnsteinUhlenbeckChain(Euclidean(), (2,), 20, 1.5)
    zero = DriftControl(_Scaled(torch.nn.Identity(), 0.0), FINEST)
    zero = DriftControl(_Zero(), FINEST)
    drawn = sample(chain, zero, chain.source(20_000, generator), generator)
    assert abs(float(drawn.x.var()) - 2.25) < 4 * 2.25 * (2 / 40_000) ** 0.5
    cost = cost_of(chain)
    found = evidence(drawn.log_ratio - cost.value(drawn.x))
    assert abs(found.log_z) < 4 * found.log_z_error


class _Zero(torch.nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("geometry", "shape"), [(Centred(), (4, 2)), (Torus(), (3,))], ids=["particles", "torus"]
)
def test_other_geometries_estimate_log_z_of_a_known_density(geometry, shape, generator):
    """An uncontrolled base and its own wrapped or centred normal of another variance as the target: log Z = 0."""
    chain = geometric_chain(geometry, shape, 10, 1.5, 0.2)
    cost = EnergyCost(Evaluator(lambda x: -geometry.log_normal(x, 1.2)), chain)
    drawn = sample(chain, DriftControl(_Zero(), 0.2), chain.source(20_000, generator), generator)
    found = evidence(drawn.log_ratio - cost.value(drawn.x))
    assert abs(found.log_z) < 4 * found.log_z_error and found.ess > 0.2
    if isinstance(geometry, Centred):
        assert float(drawn.x.mean(1).abs().max()) < 1e-5
    grad = cost.grad(drawn.x[:8])
    assert torch.allclose(geometry.project(grad), grad, atol=1e-6)


def test_target_of_the_torus_uses_the_wrapped_score(generator):
    geometry = Torus()
    chain = geometric_chain(geometry, (1,), STEPS, 5.0, 0.1)
    uniform = EnergyCost(Evaluator(lambda x: (0 * x).sum(1)), chain)
    method = AdjointSampling(chain, uniform)
    x1 = geometry.wrap(10 * torch.randn(1_000, 1, generator=generator))
    _, _, drift = method.project({"x1": x1, "grad": torch.zeros_like(x1)}, generator)
    assert float(drift.abs().max()) < 0.01  # a nearly uniform base; −X_1/h², unwrapped, reaches .13
    assert float((x1 / chain.end_variance).abs().max()) > 0.1


def test_misuse_is_refused():
    chain = chain_of(initial=lambda n, g: noise(Euclidean(), torch.zeros(n, 2), g))
    with pytest.raises(TiltflowError, match="AdjointBridgeSampling"):
        AdjointSampling(chain, cost_of(chain))
    with pytest.raises(TiltflowError, match="end law"):
        cost_of(chain).value(torch.zeros(2, 2))
    with pytest.raises(TiltflowError, match="minimum_ess"):
        AdjointSampling(chain_of(), cost_of(chain_of()), minimum_ess=1.5)
    with pytest.raises(TiltflowError, match="finest"):
        geometric_chain(Euclidean(), (2,), 10, 0.1, 1.0)
    with pytest.raises(TiltflowError, match="rise"):
        BrownianChain(Euclidean(), (2,), torch.linspace(0, 1, 3), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(TiltflowError, match="point 0"):
        reversed_log_ratio(chain, optimal(chain), torch.zeros(2, 2), torch.Generator())
