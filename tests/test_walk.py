"""Every method on every kind of chain and control: what it says of its paths, against Gaussian densities written out here.

A method that cannot take a chain, or a control with its own step variance, refuses it by name before it draws anything.
"""

import importlib
import inspect
import math
import pkgutil
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tiltflow.methods
from tiltflow.core import simulate as simulation
from tiltflow.core.brownian import OrnsteinUhlenbeckChain, geometric_chain
from tiltflow.core.chain import DriftChain, euler_maruyama, memoryless_chain, uniform_grid
from tiltflow.core.control import DriftControl, FineTuned, NetworkControl, StepVariance, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Torus
from tiltflow.core.noise import Constant
from tiltflow.core.value import reversed_log_ratio, value
from tiltflow.core.weights import ess, evidence, tempered
from tiltflow.energies import Evaluator
from tiltflow.energies.cost import EnergyCost
from tiltflow.methods import backpropagation, guidance, smc
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.methods.backpropagation import Backpropagation, discrete_adjoint, draft, refl
from tiltflow.methods.best_of_n import BestOfN
from tiltflow.methods.bridge_sampling import AdjointBridgeSampling, BridgeMatching, DampedBridgeMatching
from tiltflow.methods.deterministic import DeterministicAdjointMatching
from tiltflow.methods.guidance import GradientGuidance
from tiltflow.methods.idem import IteratedDenoising
from tiltflow.methods.log_variance import LogVariance, path_log_ratio
from tiltflow.methods.policy_gradient import PolicyGradient, flow_grpo, reinforce
from tiltflow.methods.preference import PreferencePairs
from tiltflow.methods.reciprocal import ReciprocalMatching
from tiltflow.methods.score_function import ReinforceAdjointMatching
from tiltflow.methods.several import SeveralAdjointSampling
from tiltflow.methods.smc import PathSMC, feynman_kac, urge
from tiltflow.methods.socm import SOCM, LearnedMatrices
from tiltflow.methods.weighted_flow_matching import WeightedFlowMatching, path_weighted
from tiltflow.nn.mlp import MLP, EventMLP, SystemMLP
from tiltflow.problems.tilt import mixture2d
from tiltflow.train.method import Method, State, TrainingFree

K, B, SEED, FINEST = 5, 8, 7, 0.3
PROCESS = mixture2d().process()
GRID = uniform_grid(K)
SPACES = {"euclidean": (Euclidean(), (2,), 2), "centred": (Centred(), (4, 2), 6), "torus": (Torus(), (2,), 2)}
CHAINS = (
    "memoryless", "noiseless_last", "euler_maruyama", "drift", "brownian_noise",
    *(f"{kind}_{space}" for kind in ("brownian", "ou") for space in SPACES),
)  # fmt: skip
MEMORYLESS = set(CHAINS) - {"euler_maruyama", "drift", "brownian_noise"}
"""Where the value of the start is the same for all starts."""


def chain_of(name):
    """The chain and its geometry's dimension."""
    v = 0.1 * torch.ones(K)
    if name in ("memoryless", "noiseless_last"):
        return memoryless_chain(PROCESS, GRID, v, name == "noiseless_last"), 2
    if name == "euler_maruyama":
        return euler_maruyama(PROCESS, GRID, Constant(0.7)), 2
    start = lambda n, g: torch.randn(n, 2, generator=g)  # noqa: E731
    if name == "drift":
        return DriftChain.build(lambda x, t: torch.sin(x) - t[:, None], start, GRID, Constant(0.8)), 2
    if name == "brownian_noise":
        return geometric_chain(Euclidean(), (2,), K, 1.5, FINEST, start), 2
    geometry, shape, dimension = SPACES[name.split("_")[1]]
    if name.startswith("ou"):
        return OrnsteinUhlenbeckChain(geometry, shape, K, 1.2), dimension
    return geometric_chain(geometry, shape, K, 1.5, FINEST), dimension


@dataclass(frozen=True)
class Wider:
    """Any control with a step variance of its own."""

    inner: FineTuned | NetworkControl

    @property
    def module(self):
        return self.inner.module

    def mean(self, chain, k, x, base_mean=None, **condition):
        return self.inner.mean(chain, k, x, base_mean, **condition)

    def ratios(self, chain):
        return torch.linspace(0.7, 1.3, len(chain.std))


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return module


def control_of(name, own_variance):
    if name in ("memoryless", "noiseless_last", "euler_maruyama"):
        inner = FineTuned(tilted(PROCESS, randomised(MLP(4, 2, 8, 2))))
        return Wider(inner) if own_variance else inner
    if name == "drift":
        inner = NetworkControl(randomised(MLP(2, 2, 8, 2)))
        return Wider(inner) if own_variance else inner
    size, periodic = math.prod(chain_of(name)[0].event_shape), name.endswith("torus")
    net = randomised(EventMLP(MLP(2 * size if periodic else size, size, 8, 2), periodic=periodic))
    if own_variance:
        net = StepVariance(net, K)
        net.share.copy_(torch.linspace(0.8, 0.2, K))
        return DriftControl(net, FINEST)
    return NetworkControl(net) if name.startswith("ou") else DriftControl(net, FINEST)


def cost_of(chain):
    return RewardCost(lambda x: torch.sin(x).flatten(1).sum(1), 0.5)


def energy_of(chain):
    return EnergyCost(Evaluator(lambda x: (1 - torch.cos(x - 0.5)).flatten(1).sum(1)), chain, 10.0)


# the brute force: nothing of tiltflow.core.simulate


def log_normal(x, mean, std, dimension):
    """Log-density of a normal on a tangent space of the given dimension."""
    return -((x - mean) ** 2).flatten(1).sum(1) / (2 * std**2) - dimension * (math.log(std) + 0.5 * math.log(2 * math.pi))


def rho_of(chain, control):
    ratios = None if control is None else control.ratios(chain)
    return [1.0] * K if ratios is None else ratios.tolist()


@torch.no_grad()
def by_hand(chain, control, n=B, seed=SEED, lift=None):
    """Paths (K+1, n, *event) from the draws of a generator; ``lift(k, x)`` is added to the mean."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    x = [chain.source(n, generator)]
    for k, rho in enumerate(rho_of(chain, control)):
        std, noise = float(chain.std[k]), torch.randn(x[0].shape, generator=generator)
        if isinstance(chain.geometry, Centred):
            noise = noise - noise.mean(1, keepdim=True)
        acting = control is not None and std > 0
        mean = control.mean(chain, k, x[-1]) if acting else chain.base_mean(k, x[-1])
        mean = mean + (0.0 if lift is None or std == 0 else lift(k, x[-1]))
        x.append(mean + (rho if acting else 1.0) * std * noise)
    return torch.stack(x)


@torch.no_grad()
def densities(chain, control, path, dimension, lift=None):
    """(log dP_base/dP_u, KL) of a path, each (n,), from the densities of its transitions."""
    log_ratio, kl = torch.zeros(path.shape[1]), torch.zeros(path.shape[1])
    for k, rho in enumerate(rho_of(chain, control)):
        std = float(chain.std[k])
        if std == 0:
            continue
        x, after, base = path[k], path[k + 1], chain.base_mean(k, path[k])
        mean = base if control is None else control.mean(chain, k, x)
        mean = mean + (0.0 if lift is None else lift(k, x))
        log_ratio += log_normal(after, base, std, dimension) - log_normal(after, mean, rho * std, dimension)
        gap = ((mean - base) ** 2).flatten(1).sum(1)
        kl += 0.5 * (dimension * rho**2 + gap / std**2 - dimension) - dimension * math.log(rho)
    return log_ratio, kl


class Case:
    """A chain, a control, and what the brute force says of B paths of it from ``SEED``."""

    def __init__(self, name, own_variance):
        self.name, (self.chain, self.dimension) = name, chain_of(name)
        self.control, self.cost = control_of(name, own_variance), cost_of(self.chain)
        self.generator = torch.Generator().manual_seed(SEED)

    def state(self):
        return State(self.control, self.generator)

    def paths(self, **options):
        path = by_hand(self.chain, self.control, **options)
        return path, *densities(self.chain, self.control, path, self.dimension)

    def same_kl(self, metrics, **options):
        kl = self.paths(**options)[2]
        assert float(kl.mean()) > 0.01
        assert metrics["kl"] == pytest.approx(float(kl.mean()), rel=1e-9)

    def log_w(self):
        path, log_ratio, _ = self.paths()
        return log_ratio - self.cost.value(path[-1])


# one check a method; each is given a case and raises what the method raises


def check_adjoint_matching(c, **options):
    method = AdjointMatching(c.chain, c.cost, B, importance=True, **options)
    found = method.collect(c.state())
    c.same_kl(found.metrics)
    assert torch.allclose(found.material["weight"][:B], tempered(c.log_w()) * B, rtol=1e-7)
    assert bool(torch.isfinite(method.loss(c.control, found.material, c.generator)))


def check_endpoint_share(c):
    check_adjoint_matching(c, endpoint_share=0.5 * torch.ones(K))


def check_discrete_adjoint(c):
    method = discrete_adjoint(c.chain, c.cost, B)
    found = method.collect(c.state())
    c.same_kl(found.metrics)
    path, _, kl = c.paths()
    exact = float((kl + c.cost.value(path[-1])).mean())
    assert float(method.loss(c.control, found.material, c.generator).detach()) == pytest.approx(exact, rel=1e-9)


def check_draft(c):
    steps = torch.nonzero(c.chain.std > 0)
    if len(steps) == K:  # else the model makes the last step, and the base does in the brute force
        found = draft(c.chain, c.cost, B, last=2).collect(c.state())
        c.same_kl(found.metrics)


def check_refl(c):
    if not isinstance(c.control, FineTuned):
        with pytest.raises(TiltflowError, match="no such prediction"):
            refl(c.chain, c.cost, B, stop=1).collect(c.state())
        return
    found = refl(c.chain, c.cost, B, stop=1).collect(c.state())
    generator = torch.Generator().manual_seed(SEED)
    path = [c.chain.source(B, generator)]
    torch.randint(1, (), generator=generator)  # which of the last step
    for k in range(K - 1):
        noise = float(c.chain.std[k]) * torch.randn(path[0].shape, generator=generator)
        path.append(c.control.mean(c.chain, k, path[-1]).detach() + noise)
    path.append(c.control.mean(c.chain, K - 1, path[-1]).detach())
    before_it = replace(c.chain, std=c.chain.std * (torch.arange(K) < K - 1))
    kl = densities(before_it, c.control, torch.stack(path), 2)[1]
    assert found.metrics["kl"] == pytest.approx(float(kl.mean()), rel=1e-9)


def check_log_variance(c):
    method = LogVariance(c.chain, c.cost, B, paths_per_start=4)
    found = method.collect(c.state())
    path = found.material["x"].transpose(0, 1)
    log_ratio, kl = densities(c.chain, c.control, path, c.dimension)
    assert torch.allclose(path_log_ratio(c.control, c.chain, found.material), -log_ratio, rtol=1e-8)
    assert found.metrics["kl"] == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found.metrics["ess"] == pytest.approx(ess(log_ratio - c.cost.value(path[-1])), rel=1e-7)


def check_policy_gradient(c, make=reinforce):
    method = make(c.chain, c.cost, B)
    found = method.collect(c.state())
    c.same_kl(found.metrics)
    rows, rho, ratios, energies = found.material, rho_of(c.chain, c.control), [], []
    before = {name: p.detach().clone() for name, p in c.control.module.named_parameters()}
    with torch.no_grad():
        for p in c.control.module.parameters():
            p.mul_(0.9)
        loss = float(method.loss(c.control, rows, c.generator))
        for i, k in enumerate(rows["k"].tolist()):
            x, after, std = rows["x"][i : i + 1], rows["x_next"][i : i + 1], float(c.chain.std[k])
            mean, old = c.control.mean(c.chain, k, x), rows["mean"][i : i + 1]
            new = log_normal(after, mean, rho[k] * std, c.dimension)
            ratios.append((new - log_normal(after, old, rho[k] * std, c.dimension)).exp())
            energies.append(((mean - c.chain.base_mean(k, x)) ** 2).sum() / (2 * std**2))
        for name, p in c.control.module.named_parameters():
            p.copy_(before[name])
    ratio, gain = torch.cat(ratios), torch.cat(ratios) * rows["advantage"]
    if method.clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - method.clip, 1 + method.clip) * rows["advantage"])
    exact = (method.kl * torch.stack(energies) - gain).mean() * int((c.chain.std > 0).sum())
    assert loss == pytest.approx(float(exact), rel=1e-7)


def check_flow_grpo(c):
    check_policy_gradient(c, flow_grpo)


def check_socm(c):
    steps = int((c.chain.std > 0).sum())
    method = SOCM(c.chain, c.cost, LearnedMatrices(2), B)
    found = method.collect(c.state())
    c.same_kl(found.metrics)
    assert found.material["weight"].shape == (B,) and found.material["x"].shape[1] == steps
    assert torch.allclose(found.material["weight"], torch.softmax(c.log_w(), 0) * B, rtol=1e-7)


def check_deterministic(c):
    found = DeterministicAdjointMatching(c.chain, c.cost, B).collect(c.state())
    rows = found.material
    with torch.no_grad():
        gap = c.control.mean(c.chain, rows["k"], rows["x"]) - rows["base_mean"]
        exact = float((gap**2 / (2 * c.chain.std[rows["k"], None] ** 2)).sum() / B)
    assert found.metrics["kl"] == pytest.approx(exact, rel=1e-9)


def check_reciprocal(c):
    found = ReciprocalMatching(c.chain, c.cost, B, importance=True).collect(c.state())
    c.same_kl(found.metrics)
    assert torch.allclose(found.material["weight"], tempered(c.log_w()) * B, rtol=1e-7)


def check_weighted_flow_matching(c):
    found = path_weighted(c.chain, c.cost, batch=B).collect(c.state())
    c.same_kl(found.metrics)
    assert found.metrics["ess"] == pytest.approx(ess(c.log_w()), rel=1e-7)
    assert torch.allclose(found.material["weight"], tempered(c.log_w()) * B, rtol=1e-7)


def check_score_function(c):
    c.same_kl(ReinforceAdjointMatching(c.chain, c.cost, B, adjoint="full").collect(c.state()).metrics)


def check_preference(c):
    c.same_kl(PreferencePairs(c.chain, c.cost, B // 2, on_policy=True).collect(c.state()).metrics)


def check_adjoint_sampling(c):
    cost = energy_of(c.chain)
    method = AdjointSampling(c.chain, cost, B, "least_variance", 0.3)
    path, log_ratio, _ = c.paths()  # before the control's variance moves
    kl = float(c.paths()[2].mean())
    found = method.collect(c.state())
    exact = evidence(log_ratio - cost.value(path[-1]))
    assert found.metrics["kl"] == pytest.approx(kl, rel=1e-9)
    assert found.metrics["log_z"] == pytest.approx(exact.log_z, rel=1e-7)
    assert found.metrics["ess"] == pytest.approx(exact.ess, rel=1e-7)
    assert torch.allclose(found.material["weight"], tempered(log_ratio - cost.value(path[-1]), 0.3) * B, rtol=1e-7)
    assert bool(torch.isfinite(method.loss(c.control, found.material, c.generator)))


def check_several(c):
    sampler = AdjointSampling(c.chain, energy_of(c.chain), B, minimum_ess=0.3)
    if len(c.chain.source(1, c.generator).shape) != 2:
        return  # for angles, (B, D)
    net = randomised(SystemMLP(1, 2, 8, 2))
    module = StepVariance(net, K) if c.control.ratios(c.chain) is not None else net
    inner = DriftControl(module, FINEST)
    generator = torch.Generator().manual_seed(SEED)
    torch.randperm(1, generator=generator)
    told = _Told(inner)
    path = by_hand(c.chain, told, seed=generator)
    kl = float(densities(c.chain, told, path, c.dimension)[1].mean())
    found = SeveralAdjointSampling([sampler], 1).collect(State(inner, torch.Generator().manual_seed(SEED)))
    assert found.metrics["kl"] == pytest.approx(kl, rel=1e-9)


@dataclass(frozen=True)
class _Told:
    """A control of one system, which is not asked for it."""

    inner: DriftControl

    def mean(self, chain, k, x, base_mean=None):
        return self.inner.mean(chain, k, x, system=torch.zeros(len(x), dtype=torch.long))

    def ratios(self, chain):
        return self.inner.ratios(chain)


def check_bridge(c):
    kl = float(c.paths()[2].mean())
    method = AdjointBridgeSampling(c.chain, energy_of(c.chain), lambda x, t: torch.zeros_like(x), B)
    assert method.collect(c.state()).metrics["kl"] == pytest.approx(kl, rel=1e-9)
    data = BridgeMatching(method, lambda n, g: (c.chain.source(n, g), c.chain.source(n, g) + 0.0))
    assert bool(torch.isfinite(data.loss(c.control, data.collect(c.state()).material, c.generator)))


def check_damped(c):
    kl = float(c.paths()[2].mean())
    method = DampedBridgeMatching(c.chain, energy_of(c.chain), c.control, B)
    assert method.collect(c.state()).metrics["kl"] == pytest.approx(kl, rel=1e-9)


def check_idem(c):
    c.same_kl(IteratedDenoising(c.chain, energy_of(c.chain), FINEST, B, draws=3).collect(c.state()).metrics)


def check_smc(c, make=lambda chain, cost: PathSMC(chain, cost, threshold=0.0)):
    found = make(c.chain, c.cost).sample(c.control, B, c.generator)
    path = c.paths()[0]
    assert torch.allclose(found.x, path[-1], atol=1e-12)
    assert torch.allclose(found.log_weights, c.log_w(), rtol=1e-8, atol=1e-10)


def check_feynman_kac(c):
    check_smc(c, lambda chain, cost: feynman_kac(chain, cost, threshold=0.0))


def ascent_of(c, scale=1.0):
    """s_k² times the gradient of −g(X̂_1(x)), by automatic differentiation."""
    base = getattr(c.chain, "base", None)

    def lift(k, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            end = x if base is None else base.x1(x, c.chain.t[k].expand(len(x)))
            (up,) = torch.autograd.grad(-c.cost.value(end).sum(), x)
        up = up - up.mean(1, keepdim=True) if isinstance(c.chain.geometry, Centred) else up
        return scale * float(c.chain.std[k]) ** 2 * up

    return lift


def check_urge(c):
    """Guided where no control is given."""
    found = urge(c.chain, c.cost, threshold=0.0).sample(None, B, c.generator)
    path = by_hand(c.chain, None, lift=(lift := ascent_of(c)))
    log_ratio, _ = densities(c.chain, None, path, c.dimension, lift)
    assert torch.allclose(found.x, path[-1], atol=1e-12)
    assert torch.allclose(found.log_weights, log_ratio - c.cost.value(path[-1]), rtol=1e-8, atol=1e-10)


def check_guidance(c):
    found = GradientGuidance(c.chain, c.cost, 0.8).sample(c.control, B, c.generator)
    assert torch.allclose(found.x, by_hand(c.chain, c.control, lift=ascent_of(c, 0.8))[-1], atol=1e-12)


def check_best_of_n(c):
    assert torch.allclose(BestOfN(c.chain, c.cost, 1).sample(c.control, B, c.generator).x, c.paths()[0][-1], atol=1e-12)


KERNEL, BRIDGES, POINT = {"memoryless", "noiseless_last"}, {c for c in CHAINS if c.startswith("brownian")}, "brownian_noise"
VECTORS = {c for c in CHAINS if not c.endswith("centred")}
NO_KERNEL, NO_BRIDGES = ("on the memoryless chain of an interpolant only",), ("bridges of a Brownian chain",)
CHECKS = {
    # method: (check, classes, chains it takes, what it says of others, whether it takes a step variance)
    "adjoint_matching": (check_adjoint_matching, (AdjointMatching,), set(CHAINS), (), True),
    "basic": (lambda c: check_adjoint_matching(c, adjoint="full"), (AdjointMatching,), set(CHAINS), (), True),
    "endpoint_share": (check_endpoint_share, (AdjointMatching,), KERNEL, NO_KERNEL, True),
    "discrete_adjoint": (check_discrete_adjoint, (Backpropagation,), set(CHAINS), (), True),
    "draft": (check_draft, (Backpropagation,), set(CHAINS), (), True),
    "refl": (check_refl, (Backpropagation,), set(CHAINS), (), True),
    "log_variance": (check_log_variance, (LogVariance,), set(CHAINS), (), True),
    "reinforce": (check_policy_gradient, (PolicyGradient,), set(CHAINS), (), True),
    "flow_grpo": (check_flow_grpo, (PolicyGradient,), set(CHAINS), (), True),
    "socm": (check_socm, (SOCM,), VECTORS, ("SOCM is for vectors",), True),
    "deterministic": (check_deterministic, (DeterministicAdjointMatching,), KERNEL, NO_KERNEL, False),
    "reciprocal": (check_reciprocal, (ReciprocalMatching,), KERNEL, NO_KERNEL, True),
    "path_weighted": (check_weighted_flow_matching, (WeightedFlowMatching,), KERNEL, NO_KERNEL, True),
    "score_function": (check_score_function, (ReinforceAdjointMatching,), KERNEL, NO_KERNEL, False),
    "preference": (check_preference, (PreferencePairs,), KERNEL, NO_KERNEL, False),
    "adjoint_sampling": (check_adjoint_sampling, (AdjointSampling,), BRIDGES - {POINT}, (*NO_BRIDGES, "the point 0"), True),
    "several": (check_several, (SeveralAdjointSampling,), BRIDGES - {POINT}, (*NO_BRIDGES, "the point 0"), True),
    "asbs": (check_bridge, (AdjointBridgeSampling, BridgeMatching), BRIDGES, NO_BRIDGES, True),
    "bridge_matching": (check_damped, (DampedBridgeMatching,), BRIDGES, NO_BRIDGES, True),
    "idem": (check_idem, (IteratedDenoising,), {POINT}, (*NO_BRIDGES, "build its chain with that source"), True),
    "smc": (check_smc, (PathSMC,), set(CHAINS), (), True),
    "feynman_kac": (check_feynman_kac, (PathSMC,), set(CHAINS), (), True),
    "urge": (check_urge, (PathSMC,), set(CHAINS), (), True),
    "guidance": (check_guidance, (GradientGuidance,), set(CHAINS), (), True),
    "best_of_n": (check_best_of_n, (BestOfN,), set(CHAINS), (), True),
}


def test_no_method_is_left_out():
    found = set()
    for module in pkgutil.iter_modules(tiltflow.methods.__path__):
        here = importlib.import_module(f"tiltflow.methods.{module.name}")
        classes = (v for _, v in inspect.getmembers(here, inspect.isclass) if v.__module__ == here.__name__)
        found |= {c for c in classes if {Method, TrainingFree} & set(c.__mro__)}
    assert found == {c for _, classes, *_ in CHECKS.values() for c in classes}


@pytest.mark.parametrize("own_variance", [False, True])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("method", CHECKS)
def test_what_a_method_says_of_its_paths(method, name, own_variance):
    check, _, chains, refusals, takes_variance = CHECKS[method]
    case = Case(name, own_variance)
    before = case.generator.get_state()
    if name not in chains:
        with pytest.raises(TiltflowError, match="|".join(refusals)):
            check(case)
    elif own_variance and not takes_variance:
        with pytest.raises(TiltflowError, match=r"\w+ is derived for steps of the base's variance"):
            check(case)
        assert torch.equal(before, case.generator.get_state())  # nothing was drawn
    else:
        check(case)


@pytest.mark.parametrize("name", CHAINS)
def test_what_a_chain_says_of_itself(name):
    chain, _ = chain_of(name)
    assert chain.controlled.tolist() == [k for k in range(K) if float(chain.std[k]) > 0]
    assert chain.memoryless is (name in MEMORYLESS)
    if not chain.memoryless:
        with pytest.raises(TiltflowError, match="pass paths_per_start"):
            LogVariance(chain, cost_of(chain), B)
    else:
        LogVariance(chain, cost_of(chain), B)


@pytest.mark.parametrize("own_variance", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_samples_and_their_weights(name, own_variance):
    """The library's walk itself, its kernel weights, and a running cost in the path weights."""
    c = Case(name, own_variance)
    path, log_ratio, kl = c.paths()
    drawn = simulation.sample(c.chain, c.control, c.chain.source(B, c.generator), c.generator)
    assert torch.allclose(drawn.log_ratio, log_ratio, rtol=1e-8) and torch.allclose(drawn.kl, kl, rtol=1e-9)
    if drawn.log_kernel_ratio is not None:
        exact = -log_normal(path[0], 0.0, 1.0, 2)
        for k, rho in enumerate(rho_of(c.chain, c.control)):
            shrink, spread = (float(v[k]) for v in c.chain.noising_kernel)
            exact += log_normal(path[k], shrink * path[k + 1], spread, 2)
            exact -= log_normal(path[k + 1], c.control.mean(c.chain, k, path[k]), rho * float(c.chain.std[k]), 2).detach()
        assert torch.allclose(drawn.log_kernel_ratio, exact, rtol=1e-8)
    cost = replace(c.cost, running=lambda x, t: t * torch.cos(x).flatten(1).sum(1))
    whole = sum((c.chain.t[k + 1] - c.chain.t[k]) * cost.running(path[k], c.chain.t[k].expand(B)) for k in range(K))
    state = State(c.control, torch.Generator().manual_seed(SEED))
    weight = AdjointMatching(c.chain, cost, B, importance=True).collect(state).material["weight"][:B]
    assert torch.allclose(weight, tempered(c.log_w() - whole) * B, rtol=1e-7)


@pytest.mark.parametrize("own_variance", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_a_stored_path_is_retraced_alike_in_blocks(name, own_variance, monkeypatch):
    c = Case(name, own_variance)
    path = simulation.simulate(c.chain, c.control, c.chain.source(B, c.generator), c.generator)
    base_mean = torch.stack([c.chain.base_mean(k, x) for k, x in enumerate(path.x[:-1])])
    for entries in (1, 2 * path.x[0].numel(), 2**20):
        monkeypatch.setattr(simulation, "ENTRIES", entries)
        found = simulation.retrace(c.chain, c.control, path, base_mean)
        exact = densities(c.chain, c.control, path.x, c.dimension)
        assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("own_variance", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_value_and_reversed_paths(space, own_variance):
    """−log mean e^{log w} over the very paths that ``value`` draws; and a path reversed has the density of the path."""
    c = Case(f"brownian_{space}", own_variance)
    x, k, n = c.paths()[0][2, :2], 2, 3
    found = value(c.chain, c.cost, x, k, n, torch.Generator().manual_seed(1), c.control)
    generator, y, log_w = torch.Generator().manual_seed(1), x.repeat_interleave(n, 0), torch.zeros(2 * n)
    for j in range(k, K):
        rho, std, noise = rho_of(c.chain, c.control)[j], float(c.chain.std[j]), torch.randn(y.shape, generator=generator)
        noise = noise - noise.mean(1, keepdim=True) if space == "centred" else noise
        mean = c.control.mean(c.chain, j, y).detach()
        after = mean + rho * std * noise
        log_w += log_normal(after, y, std, c.dimension) - log_normal(after, mean, rho * std, c.dimension)
        y = after
    log_w = (log_w - c.cost.value(y)).reshape(2, n)
    assert torch.allclose(found.value, math.log(n) - torch.logsumexp(log_w, 1), rtol=1e-9)
    seen = []

    @dataclass(frozen=True)
    class Seen:
        inner: DriftControl

        def mean(self, chain, k, x, base_mean=None):
            seen.append(x)
            return self.inner.mean(chain, k, x, base_mean)

        def ratios(self, chain):
            return self.inner.ratios(chain)

    end = c.paths()[0][-1]
    log_ratio = reversed_log_ratio(c.chain, Seen(c.control), end, torch.Generator().manual_seed(2))
    if space != "torus":  # there the end is lifted by a winding that is not seen
        path = torch.stack([*seen[::-1], end])
        assert torch.allclose(log_ratio, densities(c.chain, c.control, path, c.dimension)[0], rtol=1e-8)


# known-bad twins


@pytest.mark.parametrize("method", ["adjoint_matching", "log_variance", "smc", "socm", "adjoint_sampling"])
def test_a_walk_without_the_normalisation_is_caught(method, monkeypatch):
    """d log ρ dropped; where all weights are normalised it must not be a constant, so the KL is caught there."""
    right = simulation.log_ratio
    wrong = lambda u, noise, dimension, ratio=1.0: right(u, noise, 0, ratio)  # noqa: E731
    monkeypatch.setattr(simulation, "log_ratio", wrong)
    monkeypatch.setattr("tiltflow.methods.log_variance.log_ratio", wrong)
    monkeypatch.setattr(simulation, "step_kl", lambda u, dimension, ratio=1.0: simulation.energy(u))
    CHECKS[method][0](Case("brownian_euclidean", False))  # ρ = 1 has nothing to lose
    with pytest.raises(AssertionError):
        CHECKS[method][0](Case("brownian_euclidean", True))


@pytest.mark.parametrize("method", ["adjoint_matching", "discrete_adjoint", "smc", "guidance", "best_of_n"])
def test_noise_that_is_not_projected_is_caught(method, monkeypatch):
    def ambient(geometry, x, generator):
        return torch.randn(x.shape, generator=generator)

    monkeypatch.setattr(simulation, "tangent_noise", ambient)
    monkeypatch.setattr(backpropagation, "tangent_noise", ambient)
    monkeypatch.setattr(smc, "noise", ambient)
    monkeypatch.setattr(guidance, "noise", ambient)
    CHECKS[method][0](Case("brownian_euclidean", True))
    with pytest.raises(AssertionError):
        CHECKS[method][0](Case("brownian_centred", True))


@pytest.mark.parametrize("method", ["adjoint_matching", "discrete_adjoint", "log_variance", "smc", "guidance"])
def test_a_walk_with_the_bases_variance_is_caught(method, monkeypatch):
    """ρ ignored, as by these methods once."""
    monkeypatch.setattr(f"{__name__}.rho_of", lambda chain, control: [1.0] * K)  # the brute force is the wrong one here
    CHECKS[method][0](Case("brownian_euclidean", False))
    with pytest.raises(AssertionError):
        CHECKS[method][0](Case("brownian_euclidean", True))
