"""Situations that users of pipelines have reported, on tiny models; each by its name."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers as D
import tiny_pipelines as tiny
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file

import tiltflow as tf
from tiltflow.core.chain import posterior_step
from tiltflow.pipelines import train as module
from tiltflow.pipelines.adapters import remove_adapter
from tiltflow.pipelines.chain import Adapted, pipeline_chain
from tiltflow.pipelines.conditions import DrawnConditions
from tiltflow.pipelines.embeddings import joined, on_disk
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.families import family_of
from tiltflow.pipelines.names import load_pipeline
from tiltflow.pipelines.schedules import nodes_of
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


# ------------------------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float32, True), (torch.float16, False), (torch.float16, True)])
def test_decoders_that_scale_channels_or_overflow_show_what_stock_shows(dtype, scaled):
    """Stable Diffusion XL: latents_mean and latents_std; force_upcast, in which half precision is not enough."""
    pipe = tiny.build("stable_diffusion_xl")
    channels = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.3, 0.7, 2.0, 0.9]} if scaled else {}
    pipe.vae.register_to_config(force_upcast=True, scaling_factor=0.7, **channels)
    if dtype == torch.float16:
        with torch.no_grad():
            pipe.vae.post_quant_conv.weight.mul_(1e4)
            pipe.vae.decoder.conv_in.weight.mul_(1e4)  # beyond 65504, until a norm
    pipe.vae.to(dtype)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    mine = family_of(pipe).decode(pipe, x)
    (slope,) = torch.autograd.grad(mine.sum(), x)
    assert pipe.vae.dtype == dtype and torch.isfinite(slope).all() and slope.abs().max() > 0
    given = encode_prompts(pipe, PROMPTS)
    given = {"prompt_embeds": given["text"][:2], "pooled_prompt_embeds": given["pooled"][:2]}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(1)
    scheduler.step = lambda out, t, latents, **options: (x.detach(),)  # stock's own decoder after our latents
    shown = pipe(**given, num_inference_steps=1, guidance_scale=1.0, height=16, width=16, output_type="pt")[0]
    assert torch.isfinite(shown).all() and torch.allclose(mine, shown, atol=1e-5)


# -------------------------------------------------------------------------------------------------- networks and their files


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_network_is_saved_under_its_own_names(blocks, tmp_path):
    """Whole, or block by block; stock diffusers then draws what was trained; taken off, it is compiled still."""
    pipe = tiny.build("stable_diffusion")
    if blocks:
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)
    else:
        pipe.unet = torch.compile(pipe.unet)
    before = pipe.unet
    with torch.compiler.set_stance("force_eager"):  # wrapped as it is, and spared the minutes of a compilation
        compiled(pipe, before, tmp_path)


def compiled(pipe, before, folder):
    model = tilt(pipe, strength=50.0, rounds=2)
    model.save(folder / "lora")
    fresh = tiny.build("stable_diffusion")
    fresh.load_lora_weights(folder / "lora")
    assert not [n for n, p in fresh.unet.named_parameters() if p.is_meta or "_orig_mod" in n]
    again = tf.load(folder / "lora", pipe=tiny.build("stable_diffusion"), reward=brightness)
    assert torch.allclose(again.paths(2).x, model.paths(2).x, atol=1e-5)
    assert not torch.allclose(model.paths(2).x, model.paths(2, base=True).x, atol=1e-4)
    remove_adapter(pipe)
    assert pipe.unet is before and not [n for n, _ in pipe.unet.named_parameters() if "lora" in n]


def test_variants_shards_and_single_files(tmp_path, monkeypatch):
    """Files of half precision, weights in several files, a checkpoint in one; what stock warns about is not asked for."""
    pipe = tiny.build("stable_diffusion")
    pipe.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="20KB")
    assert len([*(tmp_path / "half" / "unet").glob("*-of-*.safetensors")]) > 1
    with pytest.raises(tf.TiltflowError, match="holds no diffusers pipeline"):
        load_pipeline(str(tmp_path / "half"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        same = load_pipeline(str(tmp_path / "half"), dtype="bfloat16", variant="fp16")
    assert same.unet.dtype == torch.bfloat16
    one, parts, asked = str(tmp_path / "one.safetensors"), str(tmp_path / "half"), []
    for wrong in (one, one.replace("safetensors", "ckpt")):
        with pytest.raises(tf.TiltflowError, match=wrong):
            load_pipeline(parts, single_file=wrong)
    save_file({"x": torch.zeros(1)}, one)
    with pytest.raises(tf.TiltflowError, match="holds no diffusers pipeline"):
        load_pipeline(parts, single_file=one)
    read = classmethod(lambda kind, file, **options: asked.append((kind, file, options)) or pipe)
    monkeypatch.setattr(D.StableDiffusionPipeline, "from_single_file", read)
    assert load_pipeline(parts, "cpu", "bfloat16", single_file=one) is pipe
    ((kind, file, options),) = asked
    assert kind is D.StableDiffusionPipeline and file == one and options["config"] == parts
    assert options["dtype"] == torch.bfloat16


def test_a_pipeline_that_offloads_between_calls_is_told_what_to_do():
    """By accelerate's hooks or by groups; text encoders may do so."""
    pipe = tiny.build("stable_diffusion")
    for part, refused in ((pipe.text_encoder, False), (pipe.unet, True), (pipe.vae, True)):
        cpu_offload_with_hook(part, "cpu")
        if refused:
            with pytest.raises(tf.TiltflowError, match="is offloaded between its calls"):
                tilt(pipe)
        else:
            tilt(pipe, strength=0.0)
            remove_adapter(pipe)
        remove_hook_from_module(part)
    apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(tf.TiltflowError, match="unet is offloaded"):
        tilt(pipe)


# ---------------------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("steps", [28, 30, 50])
def test_steps_that_do_not_divide_a_thousand_are_those_of_ddim(steps):
    """With the spacing "trailing": mean, noise and time of every step; chained as if they met, they are not."""
    scheduler = D.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False
    )
    nodes = nodes_of(scheduler, steps)
    a, b, variance = nodes.steps()
    scheduler.set_timesteps(steps)
    x, out = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        one, other = (scheduler.step(out, t, x, eta=1.0, variance_noise=z + 0 * x).prev_sample for z in (0.0, 1.0))
        x1 = nodes.p[k] * x + nodes.q[k] * out
        assert float(nodes.timestep[k]) == float(t)
        assert torch.allclose(a[k] * x + b[k] * x1, one, atol=1e-5)
        assert float(variance[k].sqrt()) == pytest.approx(float((other - one).mean()), abs=1e-5)
    meet = posterior_step(nodes.alpha, nodes.beta)[0]
    assert (float((meet - a).abs().max()) > 1e-4) == (steps != 50)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "flow"])
def test_solvers_keep_their_own_times_and_noise(kind, spacing):
    """28 steps of stock's first-order ODE from our X̂_1 are its own, flow sigmas and Karras' too."""
    options = {"timestep_spacing": spacing}
    if kind == "flow":
        kind, options = "UniPCMultistep", options | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options |= {"flow_shift": 3.0}
    elif spacing == "trailing":
        options |= {"use_karras_sigmas": True}
    options |= {} if kind == "EulerDiscrete" else {"solver_order": 1}
    scheduler = getattr(D, f"{kind}Scheduler")(**options)
    nodes = nodes_of(scheduler, 28)
    scheduler.set_timesteps(28)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 50, generator=draw, dtype=torch.float64)
    scale = (lambda k: (nodes.alpha[k] ** -1)) if kind == "EulerDiscrete" else lambda k: 1.0  # its state's unit
    for k, t in enumerate(scheduler.timesteps):
        out = torch.randn(1, 1, 50, generator=draw, dtype=torch.float64)
        assert float(nodes.timestep[k]) == pytest.approx(float(t))
        x1 = nodes.p[k] * x + nodes.q[k] * out
        mine = nodes.alpha[k + 1] * x1 + nodes.beta[k + 1] * (x - nodes.alpha[k] * x1) / nodes.beta[k]
        if hasattr(scheduler, "this_order"):
            scheduler.lower_order_nums, scheduler.last_sample = 0, None  # first order, no corrector
        theirs = scheduler.step(out, t, x * scale(k)).prev_sample / scale(k + 1)
        assert torch.allclose(mine, theirs.double(), atol=1e-4), k
        x = mine


# ---------------------------------------------------------------------------------------------------------------- embeddings


def test_encoded_prompts_are_kept_on_disk_and_found_again(tmp_path, monkeypatch):
    """The same rows to the bit, mapped and not read; encoded once; other texts, weights or negatives are others."""
    pipe, texts = tiny.build("stable_diffusion"), [f"prompt {i}" for i in range(19)]
    memory = encode_prompts(pipe, texts, "ugly")
    stored = encode_prompts(pipe, texts, "ugly", tmp_path)
    assert memory.keys() == stored.keys() and all(torch.equal(v, stored[k]) for k, v in memory.items())
    (file,) = tmp_path.iterdir()
    assert pipeline_chain(pipe, stored, 2).rows["text"].data_ptr() == stored["text"].data_ptr()
    if Path("/proc/self/maps").exists():
        assert str(file) in Path("/proc/self/maps").read_text()
    asked = []
    monkeypatch.setattr(pipe, "encode_prompt", lambda **given: asked.append(given) or 1 / 0)
    assert torch.equal(encode_prompts(pipe, texts, "ugly", tmp_path)["text"], memory["text"]) and not asked
    for change in ({"texts": texts[1:]}, {"negative": "bad"}):
        with pytest.raises(ZeroDivisionError):
            encode_prompts(pipe, **{"texts": texts, "negative": "ugly"} | change, folder=tmp_path)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).add_(1)
    with pytest.raises(ZeroDivisionError):
        encode_prompts(pipe, texts, "ugly", tmp_path)
    assert [*tmp_path.iterdir()] == [file]
    half = {"a": torch.randn(3, 5, 2).bfloat16(), "mask": torch.ones(3, 5, dtype=torch.bool), "n": torch.arange(3)}
    short = {name: v[:, :2] if v.ndim > 1 else v for name, v in half.items()}
    mapped = on_disk(tmp_path, "ragged", iter([short, half]))
    for name, v in joined([short, half]).items():
        assert torch.equal(mapped[name], v) and len(v) == 5 and v.shape[1:] == half[name].shape[1:]
