"""Every method of the table on a tiny pipeline, or its refusal; and the model: sampled, judged, saved, loaded."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

import tiltflow as tf
from tiltflow.methods.policy_gradient import PolicyGradient
from tiltflow.methods.registry import METHODS, names
from tiltflow.pipelines.adapters import add_adapter
from tiltflow.pipelines.chain import Adapted, pipeline_chain
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.train import LACKS, made
from tiltflow.train.method import State

PROMPTS = ["a red cat", "blue"]
QUICK = {"rounds": 2, "batch": 8, "steps": 4, "rank": 2, "learning_rate": 0.02, "ema": 0.0, "per_prompt": 4, "warmup": 0}
VALUES_ONLY = ("log_variance", "reinforce", "flow_grpo", "best_of_4")
APPLY = tuple(name for name in names("finetune") if not {*METHODS[name].needs} & {*LACKS})


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def brightness(images, texts):
    return images.flatten(1).mean(1)


def by_numpy(images, texts):
    """The same, without a gradient."""
    return torch.from_numpy(images.numpy().reshape(len(images), -1).mean(1))


def settings(method, **changes):
    return tf.PipelineSettings.of(method, **QUICK | changes)


def tilt(method, reward=brightness, strength=50.0, pipe=None, callback=None, **changes):
    pipe = pipe or tiny.build("stable_diffusion")
    return tf.finetune_pipeline(pipe, reward, PROMPTS, strength, method, settings(method, **changes), callback=callback)


def weights(model):
    return [p.detach().clone() for name, p in model.chain.network.named_parameters() if "lora_" in name]


def test_these_apply():
    assert APPLY == (
        "adjoint_matching", "adjoint_matching_plain", "adjoint_matching_truncated", "adjoint_matching_basic",
        "discrete_adjoint", "log_variance", "draft_1", "draft_10", "reinforce", "flow_grpo", "best_of_4",
    )  # fmt: skip


@pytest.mark.parametrize("method", names("finetune"))
def test_every_method_trains_a_pipeline_or_says_why_not(method):
    """Two rounds move the adapter; methods without training leave none; others are refused by name, with nothing put on."""
    pipe = tiny.build("stable_diffusion")
    before = list(pipe.unet.state_dict())
    if method not in APPLY:
        with pytest.raises(tf.TiltflowError, match=f"'{method}' does not apply to pipelines: it needs"):
            tilt(method, pipe=pipe)
        assert list(pipe.unet.state_dict()) == before
        return
    steps = {"steps": 12} if method == "draft_10" else {}
    model = tilt(method, by_numpy if method in VALUES_ONLY else brightness, pipe=pipe, **steps)
    if METHODS[method].trained:
        assert len(model.history) == 2 and {"reward", "kl", "loss", "grad_norm"} <= set(model.history[0])
        assert all(row["grad_norm"] > 0 for row in model.history)
        assert any(float(p.detach().abs().max()) > 0 for n, p in model.chain.network.named_parameters() if "lora_B" in n)
    else:
        assert model.history == [] and list(pipe.unet.state_dict()) == before
    assert model.sample(3).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("method", ["adjoint_matching_plain", "draft_1"])
@pytest.mark.parametrize("reward", [by_numpy, lambda x, texts: brightness(x, texts).detach()], ids=["numpy", "detached"])
def test_a_reward_without_a_gradient_is_told_what_to_use(method, reward):
    with pytest.raises(tf.TiltflowError, match="that needs its values only: log_variance, reinforce, flow_grpo, best_of_4"):
        tilt(method, reward)


def test_a_reward_that_is_wrong_is_not_said_to_lack_a_gradient():
    with pytest.raises(RuntimeError, match="must match"):
        tilt("adjoint_matching_plain", lambda x, texts: (x + torch.zeros(7)).flatten(1).mean(1))


@pytest.mark.parametrize("method", ["flow_grpo", "reinforce", "log_variance"])
def test_paths_are_compared_with_those_of_their_prompt(method):
    """Groups of per_prompt rows with one prompt each, all prompts in turn; sizes that do not fit are refused."""
    model = tilt(method, strength=0.0)
    network = model.control.network
    generator = torch.Generator().manual_seed(0)
    trainer = made(model, Adapted(network), generator)
    material = trainer.collect(State(Adapted(network), generator)).material
    prompt = material["condition.prompt"].reshape(-1, 2, 4)
    assert (prompt == prompt[..., :1]).all() and sorted(prompt[0, :, 0].tolist()) == [0, 1]
    for wrong in ({"per_prompt": 3}, {"per_prompt": 1}):
        with pytest.raises(tf.TiltflowError, match=f"'{method}' compares the paths of a prompt"):
            tilt(method, **wrong)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["flow_grpo", "reinforce"])
def test_steps_that_led_to_more_reward_become_more_likely(monkeypatch, method, sign):
    """After a round on values only, log π_θ/π of its own steps grows with the reward of their ends, or falls if negated."""
    seen, collect = [], PolicyGradient.collect
    monkeypatch.setattr(PolicyGradient, "collect", lambda self, state: seen.append(collect(self, state)) or seen[-1])
    strength = 1e4  # of rewards that differ by 1e-4
    model = tilt(method, lambda x, texts: sign * by_numpy(x, texts), strength, rounds=1, gradient_steps=4)
    rows = seen[0].material
    x, k, prompt = rows["x"], rows["k"], rows["condition.prompt"]
    std = model.chain.std[k].float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        mean = Adapted(model.chain.network).mean(model.chain, k, x, prompt=prompt)
    old, new = (((rows["x_next"] - m) / std).square().flatten(1).sum(1) for m in (rows["mean"], mean))
    ends = rows["x_next"][k == k.max()]
    reward = by_numpy(model.decode(ends), None).reshape(-1, 4)
    better = (reward - reward.mean(1, keepdim=True)).flatten().repeat(len(x) // len(ends))
    assert sign * float((better * 0.5 * (old - new)).sum() / (better.norm() * (0.5 * (old - new)).norm())) > 0.05


@pytest.mark.parametrize("method", ["discrete_adjoint", pytest.param("adjoint_matching_basic", marks=pytest.mark.slow)])
def test_methods_that_differentiate_base_and_control_bear_gradient_checkpointing(method):
    """What the network computes again is computed under the adapter's state of then, of both in one graph."""
    losses = []
    for checkpointing in (False, True):
        pipe = tiny.build("stable_diffusion")
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        losses.append(tilt(method, pipe=pipe, steps=4))
    for a, b in zip(*map(weights, losses), strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    assert losses[0].history[1]["loss"] == pytest.approx(losses[1].history[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("places", [("control",), ("adjoint",), ("rollout", "control", "adjoint")])
def test_a_control_does_not_depend_on_a_base_mean_that_it_is_given(places):
    """Nor does its derivative: wherever guidance stands, against one that it computes itself."""
    pipe = tiny.build("stable_diffusion")
    s = settings("discrete_adjoint", guidance=3.0, guidance_in=places)
    chain = pipeline_chain(pipe, encode_prompts(pipe, PROMPTS), 4, s.scale("adjoint"))
    network = add_adapter(pipe, 2, torch.Generator().manual_seed(0))
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(1))
    control = Adapted(network, s.scale("control"), relative=s.scale("control") != s.scale("adjoint"))
    x, prompt = chain.source(2, torch.Generator().manual_seed(2)), torch.tensor([0, 1])
    found = []
    for given in (True, False):
        leaf = x.clone().requires_grad_(True)
        base_mean = chain.base_mean(1, leaf, prompt=prompt) if given else None
        mean = control.mean(chain, 1, leaf, base_mean=base_mean, prompt=prompt)
        found.append((mean.detach(), torch.autograd.grad(mean.square().sum(), leaf)[0]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-4)
    step = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        up, down = (control.mean(chain, 1, x + sign * step, prompt=prompt).double().square().sum() for sign in (1, -1))
    assert float(up - down) == pytest.approx(2 * float((found[0][1] * step).double().sum()), rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("flow_grpo", {"clip": 0.3}, "clip bounds a term of Adjoint Matching's loss"),
        ("reinforce", {"last_steps": 3}, "'reinforce' takes no last_steps"),
        ("adjoint_matching_truncated", {"last_steps": 3}, "takes no last_steps"),
        ("draft_1", {"offload": True}, "leave offload out"),
        ("discrete_adjoint", {"guidance": 2.0, "guidance_in": ("rollout",)}, "must name both rollout and control"),
        ("log_variance", {"accumulate": 1}, "leave accumulate out"),
        ("flow_grpo", {"buffer_rounds": 2}, "uses each round once"),
        ("draft_10", {"steps": 5}, "last=10"),
        ("no_such_method", {}, "unknown method"),
    ],
)  # fmt: skip
def test_settings_that_a_method_does_not_take(method, changes, message):
    with pytest.raises(tf.TiltflowError, match=message):
        tilt(method, **changes)


def test_a_class_of_ones_own_goes_through_the_same_door():
    class Mine(PolicyGradient):
        pass

    once = settings("flow_grpo", rounds=1)
    model = tf.finetune_pipeline(tiny.build("stable_diffusion"), by_numpy, PROMPTS, 1.0, Mine, once)
    assert model.row.name == "Mine" and len(model.history) == 1
    with pytest.raises(tf.TiltflowError, match="'Mine' is not in the table"):
        model.save("nowhere")
    with pytest.raises(tf.TiltflowError, match="takes no conditions"):
        tf.finetune_pipeline(tiny.build("stable_diffusion"), by_numpy, PROMPTS, 1.0, lambda chain, cost: None)


def test_strength_zero_changes_nothing():
    model = tilt("adjoint_matching_plain", strength=0.0)
    assert torch.equal(model.paths(4).x, model.paths(4, base=True).x) and model.history == []


def test_the_best_of_four_is_the_best_of_four():
    """Brighter than the base's by the mean of the largest of four, prompt by prompt; none of it is trained, or saved."""
    model = tilt("best_of_4", by_numpy, steps=3)
    base, best = (model.judge({"b": by_numpy}, n, base=n == 256).scores["b"] for n in (256, 64))
    for start in (0, 1):
        x, kept = base[start::2].sort().values, best[start::2]
        k, n = torch.arange(1, len(x) + 1, dtype=torch.float64), len(x)
        expected = float((x * ((k / n) ** 4 - ((k - 1) / n) ** 4)).sum())  # by the order statistics of the base's
        error = 1.2 * float(kept.std()) / len(kept) ** 0.5  # that of the base's 128 besides
        assert abs(float(kept.mean()) - expected) < 4 * error
        assert expected - float(x.mean()) > 4 * error  # a draw of the base's would fail


@pytest.mark.slow
def test_exact_samples_are_those_of_the_tilt_whatever_was_trained():
    """A model that learned the opposite, under its path weights, has the base's mean reward under e^{λr}."""
    model = replace(tilt("adjoint_matching_plain", lambda x, texts: -brightness(x, texts), steps=3), reward=brightness)
    spread = model.judge({"b": brightness}, 384, base=True).scores["b"]
    model = replace(model, strength=1.5 / float(spread[::2].std()))
    exact = brightness(model.sample(64, seed=3, exact=True), None).double()
    drawn = model.judge({"b": brightness}, 96, seed=3).scores["b"]
    for start in (0, 1):
        x, kept = spread[start::2], exact[start::2]
        expected = float(torch.softmax(model.strength * x, 0) @ x)
        error = 2 * float(kept.std()) / len(kept) ** 0.5  # of weighted draws, and the base's 192 besides
        assert abs(float(kept.mean()) - expected) < 3 * error
        assert expected - float(drawn[start::2].mean()) > 3 * error  # as drawn they fail


# ------------------------------------------------------------------------------------------------------------- the model


def test_what_is_judged_is_what_is_sampled_is_what_is_saved(tmp_path):
    """The same samples, decoded, and the same verdict from the folder on a fresh pipeline; stock diffusers loads it too."""
    model = tilt("adjoint_matching_plain", strength=200.0)
    judges = {"half": lambda x, texts: x[..., ::2].flatten(1).mean(1)}
    found = model.verdict(judges, samples=8)
    sampled = model.sample(8)
    assert found.scores[0].reached == pytest.approx(float(brightness(sampled, None).mean()), rel=1e-5)
    assert [s.name for s in found.scores] == ["reward", "half", "diversity"]
    assert [line.name for line in found.lines] == ["reward", "held-out half", "diversity kept"]
    model.save(tmp_path / "lora")
    again = tf.load(tmp_path / "lora", pipe=tiny.build("stable_diffusion"), reward=brightness)
    assert torch.allclose(again.sample(8), sampled, atol=1e-5)
    other = again.verdict(judges, samples=8)
    assert other.status == found.status
    for a, b in zip(found.scores, other.scores, strict=True):
        assert (a.base, a.reached) == (pytest.approx(b.base, abs=1e-5), pytest.approx(b.reached, abs=1e-5))
    base = tilt("adjoint_matching_plain", strength=0.0)
    assert torch.allclose(again.paths(4, base=True).x, base.paths(4).x, atol=1e-5)
    assert not torch.allclose(again.paths(4).x, base.paths(4).x, atol=1e-3)
    stock = tiny.build("stable_diffusion")
    stock.load_lora_weights(tmp_path / "lora")
    with pytest.raises(tf.TiltflowError, match="already holds a run"):
        model.save(tmp_path / "lora")
    with pytest.raises(tf.TiltflowError, match="give its reward"):
        tf.load(tmp_path / "lora", pipe=tiny.build("stable_diffusion"))
    with pytest.raises(tf.TiltflowError, match="give its pipeline"):
        tf.load(tmp_path / "lora", reward=brightness)
    with pytest.raises(tf.TiltflowError, match="has an adapter already"):
        tf.load(tmp_path / "lora", pipe=stock, reward=brightness)


@pytest.mark.slow
def test_a_page_from_python(tmp_path):
    pytest.importorskip("matplotlib")
    page = tilt("flow_grpo", by_numpy).report(tmp_path / "new", {"half": brightness}, samples=4).read_text(encoding="utf-8")
    assert "held-out half" in page and "so λ is lost" in page and "diversity kept" in page


def test_all_weights_are_saved_and_loaded_beside_their_base(tmp_path):
    model = tilt("adjoint_matching_plain", rank=None, learning_rate=1e-3)
    model.save(tmp_path / "whole")
    again = tf.load(tmp_path / "whole", pipe=tiny.build("stable_diffusion"), reward=brightness)
    for base in (False, True):
        assert torch.allclose(again.paths(4, base=base).x, model.paths(4, base=base).x, atol=1e-5)
    assert not torch.allclose(again.paths(4).x, again.paths(4, base=True).x, atol=1e-4)


def test_samples_of_other_prompts():
    """One for each text; of the training's texts they are those of the same noise."""
    model = tilt("adjoint_matching_plain")
    assert torch.equal(model.sample(PROMPTS), model.sample(2))
    assert model.sample(["x", "y", "z"], seed=1).shape == (3, 3, 16, 16)
    for wrong in (0, -1, [], "a cat"):
        with pytest.raises(tf.TiltflowError, match="at least"):
            model.sample(wrong)


def test_a_judge_sees_every_sample_once_and_a_copy_of_it():
    """One that changes what it is given does not change what the next one sees."""
    model, seen = tilt("adjoint_matching_plain", strength=0.0), []

    def mutating(x, texts):
        seen.append(len(texts))
        return x.zero_().flatten(1).mean(1)

    after = model.verdict({"mutating": mutating, "late": brightness}, samples=6)
    assert seen == [6, 6]
    assert after.scores[2].reached == after.scores[0].reached > 0 == after.scores[1].reached


@pytest.mark.parametrize("wrong", [lambda x, texts: x, lambda x, texts: 1.0, lambda x, texts: x.flatten(1).mean(1)[:1]])
def test_a_judge_of_another_shape_is_named(wrong):
    with pytest.raises(tf.TiltflowError, match="sharp returned"):
        tilt("adjoint_matching_plain", strength=0.0).verdict({"sharp": wrong}, samples=4)


@pytest.mark.parametrize(("judges", "samples"), [({}, 1), ({"reward": brightness}, 4)])
def test_verdicts_that_are_refused(judges, samples):
    with pytest.raises(tf.TiltflowError, match="at least 2 samples"):
        tilt("adjoint_matching_plain", strength=0.0).verdict(judges, samples)


def test_importing_is_light():
    """Neither the package nor the commands import torch or diffusers before one of them works."""
    code = (
        "import sys, tiltflow, tiltflow.cli.pipeline, tiltflow.cli.compare\n"
        "tiltflow.PipelineSettings.of('flow_grpo')\n"
        "print([m for m in ('torch', 'diffusers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
