"""Every job on a pretend accelerator: nothing is mixed, nothing is lost, and the numbers are those of the CPU."""

import json
from pathlib import Path

import models
import pretend
import pytest
import torch
from commands import tiltflow

import tiltflow as tf
from tiltflow.core.device import beside, companion, double
from tiltflow.core.errors import TiltflowError
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.methods.registry import names
from tiltflow.run.device import check_device
from tiltflow.sampling.settings import AutomaticSettings, SamplerSettings
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.train import checkpoint as checkpoints

HERE = Path(__file__).parent
FEW = {"rounds": 2, "batch": 16, "steps": 4}
SAMPLER = {**FEW, "draw_steps": 4, "hidden": 8, "gradient_steps": 2, "minibatch": 8}


USUAL = ("adjoint_matching", "discrete_adjoint", "log_variance", "reinforce", "path_weighted", "feynman_kac")


def some(every, usual):
    """Names as parameters, all but the usual ones slow."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in every]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def device():
    """As MPS, which refuses all that CUDA refuses, and float64 besides."""
    with pretend.accelerator("mps") as made:
        yield made


def agree(here, there):
    """The last rounds of two histories, without their clocks."""
    for name, value in there[-1].items():
        if isinstance(value, float) and "seconds" not in name:
            assert here[-1][name] == pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True), name


# --- the device itself


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x, g: x + torch.zeros(3), pretend.WrongDevice),
        (lambda x, g: torch.zeros(2, 3) @ x, pretend.WrongDevice),
        (lambda x, g: torch.zeros(3)[x.long()], pretend.WrongDevice),
        (lambda x, g: x.index_copy_(0, torch.tensor([0]), x[:1]), pretend.WrongDevice),
        (lambda x, g: torch.randn(3, generator=torch.Generator(), device=x.device), pretend.WrongDevice),
        (lambda x, g: torch.randn(3, generator=g), pretend.WrongDevice),
        (lambda x, g: g.set_state(x.byte()), pretend.WrongDevice),
        (lambda x, g: x.numpy(), RuntimeError),
        (lambda x, g: torch.nn.Linear(3, 1)(x), pretend.WrongDevice),
    ],
)
def test_what_it_refuses(fault, error):
    with pretend.accelerator() as device:
        x = torch.ones(3, device=str(device))
        with pytest.raises(error):
            fault(x, torch.Generator(str(device)))


def test_float64_is_for_cuda_alone():
    for kind, refused in (("cuda", False), ("mps", True)):
        with pretend.accelerator(kind):
            for make in (lambda: torch.ones(3, device="pretend").double(), lambda: torch.ones(3).double().to("pretend")):
                if refused:
                    with pytest.raises(pretend.NoFloat64):
                        make()
                else:
                    assert make().dtype == torch.float64


def test_what_it_counts():
    with pretend.accelerator() as device:
        x = torch.ones(3).to("pretend")
        assert (sum(device.copies.values()), sum(device.waits.values())) == (1, 0)
        assert float(x.sum()) == 3 and x.tolist() == [1, 1, 1] and x[x > 0].shape == (3,)
        assert (sum(device.copies.values()), sum(device.waits.values())) == (2, 2)


def test_it_carries_training():
    """Modules, copies of them, Adam in one kernel, autograd and generators, with the numbers of the CPU."""
    ended = []
    with pretend.accelerator():
        for place in ("pretend", "cpu"):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).to(place)
            optimiser, generator = torch.optim.Adam(net.parameters(), fused=True), torch.Generator(place).manual_seed(1)
            for _ in range(3):
                optimiser.zero_grad()
                net(torch.randn(16, 3, generator=generator, device=place)).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
            assert next(net.parameters()).device.type == place
            ended.append({name: v.cpu() for name, v in net.state_dict().items()})
    assert all(torch.equal(v, ended[1][name]) for name, v in ended[0].items())


# --- what the library has for devices


def test_what_is_needed_again_is_sent_once(device):
    values, x = torch.arange(5, dtype=torch.float64), torch.zeros(2, device=str(device))
    assert beside(values, x) is beside(values, x) and beside(values, x).dtype == x.dtype
    assert beside(values, torch.zeros(2)) is values and sum(device.copies.values()) == 1
    assert double(x).device.type == "cpu" and double(x).dtype == torch.float64


def test_a_generator_and_its_companion(device):
    own = torch.Generator().manual_seed(0)
    assert companion(own, torch.device("cpu")) is own
    there = companion(own, pretend.DEVICE)
    assert there.device == pretend.DEVICE and companion(there, pretend.DEVICE) is there


def test_auto(monkeypatch):
    for cuda, mps, found in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert check_device("auto") == found
    with pytest.raises(TiltflowError, match=r"device 'warp' is not usable here"):
        check_device("warp")


# --- fine-tuning


def tuned(place, method="adjoint_matching", base=models.process, reward=models.right, conditions=None, **changes):
    base = base()
    base.model.to(str(place))
    few = FEW | ({"steps": 12} if method in ("draft_10", "refl") else {})
    settings = FinetuneSettings.of(method, variance_samples=16, **few | changes)
    return tf.finetune(base, reward, 1.0, method, settings, device=str(place), conditions=conditions)


@pytest.mark.parametrize("method", some(names("finetune"), USUAL))
def test_every_method_fine_tunes(method, device):
    here, there = (tuned(place, method) for place in (device, "cpu"))
    x = here.sample(8)
    assert x.device == pretend.DEVICE
    if here.history:
        agree(here.history, there.history)
    if method not in ("feynman_kac", "urge"):  # which resample, by another generator
        assert torch.allclose(x.cpu(), there.sample(8), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 1},
        {"last_steps": 1, "random_steps": 1, "clip": 2.0, "max_cost_gradient": 3.0},
        {"buffer_rounds": 2, "minibatch": 8, "gradient_steps": 2, "accumulate": 4},
        {"noiseless_last": True},
        {"chi": 0.5},
        {"base": models.conditional, "conditions": models.means, "reward": models.near},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_fine_tunes(changes, device):
    here, there = (tuned(place, **changes) for place in (device, "cpu"))
    agree(here.history, there.history)


@pytest.mark.parametrize("noise", ["ode", "memoryless", 0.0])
def test_every_way_of_sampling(noise, device):
    here, there = (tuned(place) for place in (device, "cpu"))
    assert torch.allclose(here.sample(8, noise, 3).cpu(), there.sample(8, noise, 3), atol=1e-4)


def test_exact_samples_and_the_verdict(device):
    here = tuned(device)
    assert here.sample(20, exact=True).device == pretend.DEVICE
    found, expected = (model.verdict({"judge": models.judge}, 300, 300) for model in (here, tuned("cpu")))
    assert [line.status for line in found.lines] == [line.status for line in expected.lines]


# --- a run: interrupted, resumed, opened elsewhere


def finetune_command(out, *more):
    return tiltflow(
        "finetune", "--base", f"{HERE / 'models.py'}:velocity", "--predicts", "velocity", "--shape", "2", "--reward",
        f"{HERE / 'models.py'}:right", "--judge", f"{HERE / 'models.py'}:judge", "--steps", "4", "--batch", "16",
        "--buffer-rounds", "2", "--variance-samples", "16", "--checkpoint-every", "1", "--samples", "300", "--tolerance",
        "none", "--reference-samples", "300", "--out", out, "--device", "pretend", *more,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_is_resumed_and_opened_elsewhere(tmp_path, device):
    whole = tmp_path / "whole"
    for more in (("--rounds", "2"), ("--rounds", "3", "--resume")):
        done = finetune_command(whole, *more)
        assert done.returncode in (0, 3), done.stderr
    first = tf.load(whole, trust=True).sample(5)
    assert first.device.type == "cpu"
    assert torch.allclose(tf.load(whole, device="pretend", trust=True).sample(5).cpu(), first, atol=1e-4)
    assert json.loads((whole / "config.json").read_text())["device"] == "pretend"
    for name, more in (("x", ()), ("y", ("--exact",))):
        drawn = tmp_path / f"{name}.safetensors"
        assert tiltflow("sample", whole, "--trust", "-n", 5, "--device", "pretend", "--out", drawn, *more).returncode == 0


def test_a_resume_that_forgets_something_is_found(tmp_path, monkeypatch, device):
    """Stopped after two rounds of four and resumed, a run is the whole one, but not if a part of the checkpoint is lost."""
    file, load = tmp_path / "c.safetensors", checkpoints.load_state
    settings = FinetuneSettings(
        **FEW | {"rounds": 4, "buffer_rounds": 3, "checkpoint_every": 1, "variance_samples": 16, "tolerance": None}
    )

    def trained(stop=4, **how):
        base = models.process()
        base.model.to("pretend")
        how["callback"] = lambda row: row["iteration"] + 1 == stop
        model = tf.finetune(base, models.right, 1.0, settings=settings, device="pretend", checkpoint=file, **how)
        return torch.cat([p.detach().flatten().cpu() for p in model.module.parameters()])

    whole, _ = trained(), trained(1)
    start, _ = load(file) | {"generator": torch.Generator().get_state(), "buffer": {}, "iteration": 0}, trained(2)
    saved = load(file)
    monkeypatch.setattr(checkpoints, "load_state", lambda path: saved)
    assert torch.equal(trained(resume=True), whole)
    for forgotten in ("generator", "optimiser", "average", "weights", "buffer", "iteration"):
        monkeypatch.setattr(checkpoints, "load_state", lambda path, part=forgotten: saved | {part: start[part]})
        assert not torch.equal(trained(resume=True), whole), forgotten


# --- planted faults, each in one round of training


def cpu_constant(x):
    return x[:, 0] + torch.zeros(len(x))


def cpu_generator(x):
    return x[:, 0] + torch.randn(len(x), generator=torch.Generator(), device=x.device)


def double_precision(x):
    return x.double()[:, 0].to(x.dtype)


def numpy_at_once(x):
    return x[:, 0] + float(x.detach().numpy().sum())


@pytest.mark.parametrize("fault", [cpu_constant, cpu_generator, double_precision, numpy_at_once])
def test_planted_faults_are_found(fault):
    said = pytest.raises((RuntimeError, TiltflowError, TypeError), match=r"device|generator|MPS|numpy")
    with pretend.accelerator("mps"), said:
        tuned("pretend", reward=fault)


# --- samplers of energies


def trained_sampler(place, problem, method):
    settings = SamplerSettings.of(method, {}, **SAMPLER)
    return tf.train_sampler(problem, method, settings, device=str(place))


@pytest.mark.parametrize("method", some(names("sample", trained=True), ("adjoint_sampling", "bridge_matching")))
def test_every_method_samples(method, device):
    for problem in (ENERGY_PROBLEMS["gmm9"](), ENERGY_PROBLEMS["dw4"]()):
        here, there = (trained_sampler(place, problem, method) for place in (device, "cpu"))
        agree(here.history, there.history)
        assert here.sample(8).x.device == pretend.DEVICE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("dw4", "lj13", "lj55", "gmm40-50d", "many-well") else [])
        for name in ENERGY_PROBLEMS
        if name != "alanine"
    ],
)
def test_every_energy_is_sampled_and_judged(name, device):
    problem = ENERGY_PROBLEMS[name]()
    here, there = (trained_sampler(place, problem, "weighted_adjoint_sampling") for place in (device, "cpu"))
    agree(here.history, there.history)
    found, expected = (sampler.verdict(32, 8) for sampler in (here, there))
    assert [line.name for line in found.lines] == [line.name for line in expected.lines]


@pytest.mark.slow
def test_an_energy_is_sampled_by_stages(device, monkeypatch):
    monkeypatch.setattr("tiltflow.sampling.automatic.QUENCHED", 2)
    problem, few = ENERGY_PROBLEMS["unequal2d"](), AutomaticSettings(draws=400, rounds=2, particles=64, islands=2, moves=1)
    here, there = (tf.sample(problem, 200, few, device=place) for place in ("pretend", "cpu"))
    assert here.x.device == pretend.DEVICE and here.stage == there.stage
    assert here.log_z.value == pytest.approx(there.log_z.value, abs=0.1)
    assert here.verdict(compared=100).lines


class OnHost:
    """A ForceProvider, which lives on the CPU."""

    def energy_and_forces(self, x):
        y = x.numpy()
        return torch.from_numpy(0.5 * (y**2).sum(1)), torch.from_numpy(-y)


@pytest.mark.slow
def test_energies_of_the_host(tmp_path, device):
    space = ("--shape", "2", "--scale", "2", "--finest", "0.1", "--device", "pretend")
    small = ("--rounds", "2", "--batch", "16", "--steps", "4", "--draw-steps", "4", "--hidden", "8", "--samples", "64",
             "--evidence", "0")  # fmt: skip
    done = tiltflow("train-sampler", "test_device:OnHost", *space, *small, "--out", tmp_path / "run", cwd=HERE)
    assert done.returncode in (0, 3), done.stderr
    again = tf.load(tmp_path / "run", problem=ENERGY_PROBLEMS["gaussian2d"](), device="pretend")
    assert again.sample(3).x.device == pretend.DEVICE
    checked = tiltflow("check-energy", "gmm9", "--samples", "64", "--device", "pretend")
    assert checked.returncode in (0, 3), checked.stderr


# --- checks before training


def test_checks_of_reward_and_base(tmp_path, device):
    asked = ("--base", f"{HERE / 'models.py'}:velocity", "--predicts", "velocity", "--shape", "2", "--device", "pretend")
    reward = tiltflow("check-reward", "--reward", f"{HERE / 'models.py'}:right", *asked, "--samples", "200", "--steps", "5")
    base = tiltflow("check-base", *asked)
    assert reward.returncode in (0, 3) and base.returncode in (0, 3), reward.stderr + base.stderr
