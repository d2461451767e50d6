"""Situations that users of pipelines have reported, on tiny models; each by its name."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

import tiltflow as tf
from tiltflow.pipelines import train as module
from tiltflow.pipelines.chain import Adapted
from tiltflow.pipelines.conditions import DrawnConditions
from tiltflow.pipelines.families import encode_prompts, family_of
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline
from tiltflow.train.method import State
from tiltflow.verdict.paired import Judged, against_base

PROMPTS = ["a red cat", "blue"]
QUICK = {"rounds": 1, "batch": 4, "steps": 3, "rank": 2, "per_prompt": 2, "learning_rate": 0.02, "warmup": 0}


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def brightness(x, texts):
    return x.flatten(1).mean(1)


def tilt(pipe=None, reward=brightness, strength=1.0, method="adjoint_matching_plain", **changes):
    pipe = tiny.build("stable_diffusion") if pipe is None else pipe
    options = {name: changes.pop(name) for name in ("negative", "rows", "callback") if name in changes}
    settings = PipelineSettings.of(method, **QUICK | changes)
    return finetune_pipeline(pipe, reward, PROMPTS, strength, method, settings, **options)


# ------------------------------------------------------------------------------------------------------ prompts and dropout


def test_flux_without_a_negative_prompt_is_guided_against_no_text():
    """Not against its own first prompt: the row is that of the empty text, and of embeddings it must be given."""
    pipe = tiny.build(tiny.flux_with_encoders)
    rows = encode_prompts(pipe, PROMPTS)
    empty = encode_prompts(pipe, ["", "b"])
    for name, value in rows.items():
        assert torch.allclose(value[-1], empty[name][0], atol=1e-6) and not torch.allclose(value[-1], value[0], atol=1e-2)
    ugly = encode_prompts(pipe, PROMPTS, "ugly")
    assert not torch.allclose(ugly["text"][-1], rows["text"][-1], atol=1e-2)
    with torch.no_grad(), pytest.raises(tf.TiltflowError, match="give negative_prompt_embeds"):
        family_of(pipe).encode(pipe, {"prompt_embeds": rows["text"], "pooled_prompt_embeds": rows["pooled"]})


@pytest.mark.parametrize("where", ["control", "paths"])
def test_the_reward_of_a_dropped_prompt_is_given_its_own_text(where):
    """Never the negative prompt's."""
    heard = set()

    def reward(x, texts):
        heard.update(texts)
        return brightness(x, texts)

    tilt(reward=reward, negative="ugly, blurry", dropout=0.9, dropout_in=where)
    assert heard == set(PROMPTS)


def test_dropout_is_of_the_fitted_control_alone_unless_of_its_paths():
    """Rows of the network by place: paths and adjoints under all prompts, the fitted control under the negative one."""
    drawn = DrawnConditions(2, 2, 0.5)(400, torch.Generator().manual_seed(0))
    lost = drawn["fitted"] < 0
    assert (drawn["prompt"] >= 0).all() and torch.equal(~drawn["fitted"][lost], drawn["prompt"][lost])
    assert abs(float(lost.double().mean()) - 0.5) < 0.1
    model = tilt(strength=0.0, dropout=1.0)
    network, generator = model.chain.network, torch.Generator().manual_seed(0)
    material = module.made(model, Adapted(network), generator).collect(State(Adapted(network), generator)).material
    prompt, fitted = material["condition.prompt"], material["condition.fitted"]
    assert (prompt >= 0).all() and torch.equal(fitted, ~prompt)
    x, k = material["x"], material["k"]
    with torch.no_grad():
        assert torch.allclose(material["base_mean"], model.chain.base_mean(k, x, prompt=prompt), atol=1e-5)
        control = module.fitted_control(network, model.settings)
        mean = control.mean(model.chain, k, x, base_mean=material["base_mean"], prompt=prompt, fitted=fitted)
        assert torch.allclose(mean, material["base_mean"], atol=1e-6)  # an adapter that has learned nothing
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
        mean = control.mean(model.chain, k, x, base_mean=material["base_mean"], prompt=prompt, fitted=fitted)
        change = Adapted(network).mean(model.chain, k, x, prompt=fitted) - model.chain.base_mean(k, x, prompt=fitted)
    assert float(change.abs().max()) > 1e-3
    assert torch.allclose(mean - material["base_mean"], change, atol=1e-6)
    with pytest.raises(tf.TiltflowError, match="dropout_in must be paths"):
        tilt(method="flow_grpo", dropout=0.5)
    everywhere = DrawnConditions(2, 1, 1.0, in_paths=True)(4, torch.Generator().manual_seed(0))
    assert set(everywhere) == {"prompt"} and (everywhere["prompt"] < 0).all()


# ------------------------------------------------------------------------------------------------------------------ verdicts


def test_guidance_in_the_rollout_alone_is_no_kl():
    """That of an adapter that has learned nothing is 0, in training and judged; of one that has, it is its own."""
    options = {"guidance": 3.0, "guidance_in": ("rollout",)}
    model = tilt(reward=lambda x, texts: 0 * brightness(x, texts), **options)
    assert model.history[0]["kl"] == 0
    assert float(model.paths(4).kl.abs().max()) == float(model.judge({}, 4).kl.abs().max()) == 0
    moved = tilt(strength=500.0, rounds=2, method="adjoint_matching", **options)
    assert moved.control.guidance == 3.0 and moved.chain.guidance == 1.0
    everywhere = replace(moved, chain=replace(moved.chain, guidance=3.0))
    assert torch.equal(moved.paths(4).kl, everywhere.paths(4).kl) and 0 < moved.history[1]["kl"] < 20


@pytest.mark.parametrize(("rise", "status"), [(2e-7, "warn"), (0.04, "warn"), (0.06, "pass"), (1, "pass"), (-2e-7, "fail")])
def test_a_verdict_needs_an_effect(rise, status):
    """A rise that is certain and tiny beside the base's own spread is none."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    before = Judged(torch.zeros(64, 1), {"reward": x}, torch.zeros(64), 1.0)
    line = against_base(before, before._replace(scores={"reward": x + rise}))[0]
    assert line.status == status and ("no effect" in line.explanation) == (status == "warn")
