"""Flow-matching pipelines through their own call, against it: latents, what is shown, adjoints, adapters; tiny models."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import flow_checks as checks
import tiny_flows as flows

import tiltflow as tf
from tiltflow.pipelines.adapters import remove_adapter
from tiltflow.pipelines.families import family_of
from tiltflow.pipelines.outcome import strips
from tiltflow.pipelines.recorded import Recorded
from tiltflow.pipelines.settings import PipelineSettings

FAST = ("FluxPipeline with texts", "FluxKontextPipeline", "ZImagePipeline", "WanPipeline 2.2")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in flows.BUILDERS]
FEW = [pytest.param(name, marks=() if name == "WanPipeline 2.2" else pytest.mark.slow) for name in flows.BUILDERS]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_paths_and_pictures_are_stocks(name):
    latents, shown = checks.stock_error(name)
    assert latents < 1e-5 and shown < 1e-4


@pytest.mark.parametrize("name", FEW)
def test_adjoints_are_autograds(name):
    assert checks.adjoint_error(name) < 1e-3


@pytest.mark.parametrize("name", [p for p in FEW if "HiDream" not in p.values[0]])  # which takes minutes
def test_adapters_go_out_and_in(name, tmp_path):
    difference, moved = checks.adapter_error(name, tmp_path / "lora")
    assert difference < 1e-5 < moved


def test_texts_of_any_length_are_as_stock_encodes_them_together():
    """Rows of a long and a short text, asked for together, apart, and beside the unconditional one."""
    *_, chain = checks.prepared("ZImagePipeline")
    x, numbers = chain.source(3, checks.generator()), torch.tensor([0, 1, -1])
    with torch.no_grad():
        together = chain.x1(1, x, numbers, 1.0, adapted=False)
        apart = torch.cat([chain.x1(1, x[i : i + 1], numbers[i : i + 1], 1.0, adapted=False) for i in range(3)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert len({tuple(v.shape[:1]) for v in chain.rows.values()}) == 1


def test_rows_of_several_times_are_told_their_own():
    """In any order, as a minibatch of the loss has them."""
    *_, chain = checks.prepared("StableDiffusion3Pipeline")
    x, k, numbers = chain.source(4, checks.generator()), torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, -1, 0])
    with torch.no_grad():
        together = chain.x1(k, x, numbers, 1.0, adapted=False)
        for i in range(4):
            alone = chain.x1(int(k[i]), x[i : i + 1], numbers[i : i + 1], 1.0, adapted=False)
            assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


def test_sizes_and_the_guidance_that_a_model_is_told_are_arguments_of_its_call():
    """Flux at another height, and told 1 in place of 3.5; without arguments it has a family of its own."""
    pipe, _, rows = flows.build("FluxPipeline")
    given = {key: torch.cat([v, v[:1]]) for key, v in rows(2).items()}
    found = {}
    for scale in (1.0, 3.5):
        settings = PipelineSettings(steps=3, call=("height=16", "width=32", f"guidance_scale={scale}"))
        model = tf.finetune_pipeline(pipe, checks.mean, checks.PROMPTS, 0.0, settings=settings, rows=given)
        found[scale] = model.paths(2)
        assert model.decode(found[scale].x).shape == (2, 3, 16, 32)
        remove_adapter(pipe)
    assert not torch.allclose(found[1.0].x, found[3.5].x, atol=1e-3)
    assert not isinstance(family_of(pipe), Recorded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"hight": 16}, "takes no hight; it takes prompt"),
        ({"true_cfg_scale": 4.0}, "asks its transformer 2 times a step"),
    ],
)
def test_calls_that_are_refused(call, message):
    pipe, _, rows = flows.build("FluxPipeline")
    given = rows(1) | {"negative_prompt_embeds": rows(1)["prompt_embeds"]}
    given |= {"negative_pooled_prompt_embeds": rows(1)["pooled_prompt_embeds"]}
    with pytest.raises(tf.TiltflowError, match=message):
        family_of(pipe, flows.SMALL | call).bound(pipe, given)


def test_a_video_is_shown_by_frames_side_by_side():
    x = torch.arange(2 * 5).reshape(2, 5, 1, 1, 1).expand(2, 5, 3, 2, 4).float()
    shown = strips(x)
    assert shown.shape == (2, 3, 2, 16) and shown[1, 0, 0, ::4].tolist() == [5, 6, 7, 9]


def test_steps_of_each_tokens_own_are_refused():
    pipe, call, rows = flows.ltx(flows.D.LTXConditionPipeline)
    with pytest.raises(tf.TiltflowError, match="LTXConditionPipeline takes steps of each token"):
        family_of(pipe, call).bound(pipe, rows(1))


@pytest.mark.parametrize("wrong", ["height", "=3", "a b=2"])
def test_arguments_are_names_and_values(wrong):
    with pytest.raises(tf.TiltflowError, match="call must be name=value"):
        PipelineSettings(call=(wrong,))
    good = PipelineSettings(call=("height=512", "guidance_scale=3.5", "use_pe=false", "mode=fast"))
    assert good.arguments == {"height": 512, "guidance_scale": 3.5, "use_pe": False, "mode": "fast"}
