"""Pipelines of diffusers as chains, against the schedulers' own steps and the stock pipelines; tiny models."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers as D
import tiny_pipelines as tiny

from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.chain import posterior_step
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.simulate import simulate
from tiltflow.pipelines import train as module
from tiltflow.pipelines.adapters import add_adapter, load_adapter, merge_adapter, save_adapter, switch, switched
from tiltflow.pipelines.chain import Adapted, DecodedReward, pipeline_chain
from tiltflow.pipelines.check import check_pipeline_reward
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.families import family_of
from tiltflow.pipelines.schedules import nodes_of
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline

FAMILIES = tuple(tiny.BUILDERS)
STEPS = 5


def some(*usual):
    """Families as parameters, all but the usual ones slow."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embeddings(name, n):
    """Arguments of the stock pipeline's call in place of texts, as its tiny model wants them."""
    draw = generator(5)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    if name == "flux":
        given = {"prompt_embeds": normal(n, 6, 16), "pooled_prompt_embeds": normal(n, 16)}
        return given | {"negative_prompt_embeds": normal(n, 6, 16), "negative_pooled_prompt_embeds": normal(n, 16)}
    if name == "stable_audio":
        return {"prompt_embeds": normal(n, 6, 16)}
    if name == "audioldm2":
        mask = torch.ones(n, 6, dtype=torch.long)
        mask[0, 4:] = 0
        return {"prompt_embeds": normal(n, 6, 32), "attention_mask": mask, "generated_prompt_embeds": normal(n, 3, 16)} | {
            "negative_prompt_embeds": normal(1, 6, 32).repeat(n, 1, 1),
            "negative_attention_mask": torch.ones(n, 6, dtype=torch.long),
            "negative_generated_prompt_embeds": normal(1, 3, 16).repeat(n, 1, 1),
        }  # fmt: skip
    return {"prompt": ["a red cat", "blue"][:n]}


def prepared(name, steps=STEPS, **options):
    """A pipeline, the stock call's prompt arguments, and its chain."""
    pipe = tiny.build(name)
    given = embeddings(name, 2)
    if "prompt" in given:
        rows = encode_prompts(pipe, given["prompt"])
    else:
        with torch.no_grad():
            rows = family_of(pipe).encode(pipe, dict(given))
    return pipe, given, pipeline_chain(pipe, rows, steps, **options)


def stock(pipe, given, x0, steps=STEPS, guidance=1.0, **more):
    """Latents of the pipeline's own call, from x0."""
    name = type(pipe).__name__
    call = dict(given) | {"latents": x0, "num_inference_steps": steps, "output_type": "latent", "return_dict": False} | more
    if name == "FluxPipeline":
        call |= {"height": 16, "width": 16}
    else:
        call["guidance_scale"] = guidance
    if name == "AudioLDM2Pipeline":
        call |= {"audio_length_in_s": 10.24}
        if guidance == 1.0:
            call = {k: v for k, v in call.items() if not k.startswith("negative")}
    if name == "StableAudioPipeline":
        call["audio_end_in_s"] = 4.0
        pipe.scheduler.set_timesteps(steps)
    return pipe(**call)[0]


PROMPT = torch.tensor([0, 1])


# ------------------------------------------------------------------------------------------------ one step of the scheduler


def moments(step):
    """Mean and standard deviation of a scheduler's step in two shots of its noise, 0 and 1."""
    mean = step(0.0)
    return mean, (step(1.0) - mean).abs().mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_steps_are_those_of_ddim_with_eta_one(prediction, spacing):
    """Mean and variance of every step on random inputs; the time of the model too. η = 0 and another prediction differ."""
    scheduler = D.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, clip_sample=False,
        timestep_spacing=spacing, steps_offset=int(spacing == "leading"),
        set_alpha_to_one=spacing == "trailing", rescale_betas_zero_snr=prediction != "epsilon",
    )  # fmt: skip
    nodes = nodes_of(scheduler, 10)
    a, b, variance = posterior_step(nodes.alpha, nodes.beta)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # its own step cancels where the first has no signal
    x = torch.randn(1, 3, 4, 4, generator=generator(), dtype=torch.float64)
    output = torch.randn(3, 4, 4, generator=generator(1))
    for k, t in enumerate(scheduler.timesteps):
        assert float(nodes.timestep[k]) == float(t)
        step = lambda z, eta=1.0: scheduler.step(  # noqa: E731
            output.double(), t, x[0], eta=eta, variance_noise=torch.full_like(x[0], z) if eta else None  # noqa: B023
        ).prev_sample
        mean, std = moments(step)
        x1 = nodes.p[k] * x[0] + nodes.q[k] * output
        assert torch.allclose(a[k] * x[0] + b[k] * x1, mean, atol=1e-5) and abs(float(variance[k].sqrt() - std)) < 1e-5
    assert not torch.allclose(step(0.0, eta=0.0), scheduler.step(output.double(), scheduler.timesteps[0], x[0], eta=1.0,
                              variance_noise=torch.zeros_like(x[0])).prev_sample, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_steps_are_the_memoryless_sde(shift):
    """The output is X_0 − X_1: Euler's own step of the ODE. Mean and variance tend to dX = (2v − x/t)dt + √(2(1−t)/t) dB."""
    scheduler = D.FlowMatchEulerDiscreteScheduler(shift=shift)
    nodes = nodes_of(scheduler, 1000)
    scheduler.set_timesteps(1000)
    x, output = torch.randn(2, 50, generator=generator(), dtype=torch.float64)
    a, b, variance = posterior_step(nodes.alpha, nodes.beta)
    for k in (0, 300, 700, 999):
        x1, t, h = nodes.p[k] * x + nodes.q[k] * output, nodes.alpha[k], nodes.alpha[k + 1] - nodes.alpha[k]
        scheduler._step_index = None
        euler = scheduler.step(output.float(), scheduler.timesteps[k], x.float()).prev_sample
        assert torch.allclose(x + h * (x1 - x) / nodes.beta[k], euler.double(), atol=1e-5)
        if 0 < k < 999:
            v = -output
            assert torch.allclose((a[k] * x + b[k] * x1 - x) / h, 2 * v - x / t, atol=0.05 * float(1 + 1 / t))
            assert float(variance[k] / h) == pytest.approx(float(2 * (1 - t) / t), rel=0.02)
    sigma = torch.linspace(1, 1e-3, 1000, dtype=torch.float64)
    once = shift * sigma / (1 + (shift - 1) * sigma)  # twice is off by .25
    assert torch.allclose(nodes.beta[:-1], once, atol=1e-2)


def test_cosine_steps_are_those_of_its_solver_of_first_order():
    """Stable Audio's scheduler is an SDE solver: at order 1 its step is the chain's, in units √(1 + σ²) larger."""
    scheduler = D.CosineDPMSolverMultistepScheduler(solver_order=1)
    nodes = nodes_of(scheduler, 8)
    a, b, variance = posterior_step(nodes.alpha, nodes.beta)
    scheduler.set_timesteps(8)
    x, output = torch.randn(2, 50, generator=generator(), dtype=torch.float64)
    for k in range(7):
        scheduler._step_index = k
        sigma, after = scheduler.sigmas[k].double(), scheduler.sigmas[k + 1].double()
        state = x * (1 + sigma**2).sqrt()
        denoised = scheduler.precondition_outputs(state, output, sigma)
        assert torch.allclose(nodes.p[k] * x + nodes.q[k] * output, denoised, atol=1e-6)
        step = lambda z: scheduler.dpm_solver_first_order_update(denoised, state, torch.full_like(x, z))  # noqa: E731, B023
        mean, std = moments(step)
        scale = (1 + after**2).sqrt()
        assert torch.allclose((a[k] * x + b[k] * denoised) * scale, mean, rtol=1e-4, atol=1e-4)
        assert float(variance[k].sqrt() * scale / std) == pytest.approx(1, abs=1e-4)
        assert float(nodes.timestep[k]) == pytest.approx(float(scheduler.timesteps[k]))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (D.DDIMScheduler(clip_sample=True), "clips"),
        (D.DDIMScheduler(clip_sample=False, timestep_spacing="linspace"), "do not meet"),
        (D.DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "noise alone"),
        (D.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (D.CosineDPMSolverMultistepScheduler(sigma_data=0.5), "sigma_data"),
        (D.VQDiffusionScheduler(num_vec_classes=4), "VQDiffusionScheduler is unknown"),
    ],
)
def test_schedulers_that_are_refused(scheduler, message):
    with pytest.raises(TiltflowError, match=message):
        nodes_of(scheduler, 10)


def test_a_rising_noise_is_refused():
    scheduler = D.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TiltflowError, match="noise of FlowMatchEulerDiscreteScheduler rises"):
        nodes_of(scheduler, 3, sigmas=[0.2, 0.5, 1.0])


def test_a_pipeline_of_another_class_is_named():
    with pytest.raises(TiltflowError, match="DDPMPipeline is not supported"):
        family_of(D.DDPMPipeline(None, D.DDPMScheduler()))


# ---------------------------------------------------------------------------------------------------------- whole pipelines


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "audioldm2"])
def test_paths_are_those_of_the_stock_pipeline_with_ddim_noise(name, guidance):
    """The same noise through the stock pipeline with η = 1 and through the chain: the same latents, with guidance too."""
    pipe, given, chain = prepared(name, guidance=guidance)
    pipe.scheduler = D.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    x0 = chain.source(2, generator(1))
    mine = simulate(chain, None, x0, generator(2), prompt=PROMPT).x[-1]
    theirs = stock(pipe, given, x0, guidance=guidance, eta=1.0, generator=generator(2))
    assert torch.allclose(mine, theirs, atol=2e-5 * guidance), float((mine - theirs).abs().max())


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_velocities_are_those_of_the_stock_pipeline(name):
    """Euler's ODE steps with the chain's X̂_1 are the stock pipeline's: same prompts, same shifted times, same sign."""
    pipe, given, chain = prepared(name)
    x = x0 = chain.source(2, generator(1))
    for k in range(STEPS):
        with torch.no_grad():
            x1 = chain.x1(k, x, PROMPT, 1.0, adapted=False)
        x = x + (chain.nodes.beta[k] - chain.nodes.beta[k + 1]).float() * (x1 - x) / chain.nodes.beta[k].float()
    assert torch.allclose(x, stock(pipe, given, x0), atol=2e-5)


def test_denoised_samples_are_those_of_stable_audio():
    """X̂_1 at every node of the stock pipeline's own path, which its solver of order 1 leaves in ``model_outputs``."""
    pipe, given, chain = prepared("stable_audio")
    seen = []

    def look(step, t, latents):
        sigma = pipe.scheduler.sigmas[step + 1]
        seen.append((latents / (1 + sigma**2) ** 0.5, pipe.scheduler.model_outputs[-1]))

    torch.manual_seed(3)
    x0 = chain.source(2, generator(1))
    stock(pipe, given, x0, callback=look, callback_steps=1)
    states = [x0, *(x for x, _ in seen)]
    for k, (_, x1) in enumerate(seen):
        with torch.no_grad():
            mine = chain.x1(k, states[k], PROMPT, 1.0, adapted=False)
        assert torch.allclose(mine, x1, atol=1e-3 if k == 0 else 1e-4), k  # the first state is 500 times larger


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_rewarded_is_what_the_pipeline_shows(name):
    """Decoding our latents gives the stock pipeline's images or audio: scaling, shift, packing, range."""
    pipe, given, chain = prepared(name, steps=2)
    pipe.vae.register_to_config(scaling_factor=0.7, **({"shift_factor": 0.3} if hasattr(pipe, "transformer") else {}))
    x0 = chain.source(2, generator())
    torch.manual_seed(11)
    shown = torch.as_tensor(stock(pipe, given, x0, steps=2, output_type="pt"))
    torch.manual_seed(11)
    with torch.no_grad():
        mine = chain.family.decode(pipe, stock(pipe, given, x0, steps=2))
    shown = shown[:, None] if shown.ndim == 2 else shown
    samples = min(shown.shape[2], mine.shape[2])  # audio is cut to the seconds that were asked for
    scale = float(mine.std())
    assert scale > 0 and torch.allclose(mine[:, :, :samples], shown[:, :, :samples], atol=1e-3 * scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lean_adjoint_is_autograd_through_the_frozen_steps(name):
    """Down to node 1 of 3, with guidance, also a row at a time; from a reward of what is decoded and of the text."""
    pipe, _, chain = prepared(name, steps=3, guidance=2.0)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    wanted = torch.randn(pipe_output(pipe, chain).shape, generator=generator(4))

    def reward(decoded, texts):
        return (decoded * wanted).flatten(1).sum(1) * torch.tensor([len(text) + 1.0 for text in texts])

    cost = RewardCost(DecodedReward(chain, reward, ["a", "bcd", ""]), 0.7)
    path = simulate(chain, None, chain.source(2, generator()), generator(1), prompt=PROMPT)
    found = lean_adjoint(chain, path, cost, prompt=PROMPT)
    x = path.x[1].clone().requires_grad_(True)
    end = x
    for k in (1, 2):
        noise = path.x[k + 1] - path.mean[k]
        end = chain.base_mean(k, end, prompt=PROMPT) + noise
    (expected,) = torch.autograd.grad(-0.7 * cost.reward(end, prompt=PROMPT).sum(), x)
    scale = float(expected.abs().max())
    assert scale > 0 and torch.allclose(found.a[1], expected, atol=1e-3 * scale)
    small = replace(chain, micro_batch=1)
    again = lean_adjoint(small, path, RewardCost(DecodedReward(small, reward, ["a", "bcd", ""]), 0.7), prompt=PROMPT)
    assert torch.allclose(again.a, found.a, atol=1e-4 * float(found.a.abs().max()))


def pipe_output(pipe, chain):
    with torch.no_grad():
        return chain.family.decode(pipe, chain.source(1, generator()))


# ------------------------------------------------------------------------------------------------------------ fine-tuning


def brightness(decoded, texts):
    return decoded.flatten(1).mean(1)


def trained(name, reward=brightness, strength=100.0, pipe=None, method=module.DEFAULT_METHOD, **settings):
    """A tiny pipeline after a few rounds, the stock call's arguments, and its latents before anything was put on it."""
    pipe = tiny.build(name) if pipe is None else pipe
    given = embeddings(name, 2)
    rows = None
    if "prompt" not in given:
        with torch.no_grad():
            rows = family_of(pipe).encode(pipe, dict(given))
    x0 = torch.randn(2, *family_of(pipe).event_shape(pipe), generator=generator(9))
    before = latents(pipe, given, x0)
    quick = {"rounds": 2, "batch": 4, "steps": STEPS, "rank": 2, "learning_rate": 0.02, "ema": 0.0, "clip": None}
    tuned = finetune_pipeline(
        pipe, reward, given.get("prompt", ["a", "b"]), strength, method, PipelineSettings(**quick | settings), rows=rows
    )
    return tuned, given, x0, before


def latents(pipe, given, x0):
    torch.manual_seed(11)  # stable audio's own noise
    return stock(pipe, given, x0)


@pytest.mark.parametrize("name", some("stable_diffusion", "stable_diffusion_3", "flux", "stable_audio"))
def test_an_adapter_goes_into_the_stock_pipeline_as_it_was_trained(name, tmp_path):
    """Off is the base, bit for bit. On, saved and loaded into a fresh pipeline it makes the same latents; so does merged."""
    tuned, given, x0, before = trained(name)
    network = tuned.chain.network
    switch(network, False)
    assert torch.equal(latents(tuned.pipe, given, x0), before)
    switch(network, True)
    after = latents(tuned.pipe, given, x0)
    assert (after - before).abs().max() > 1e-4
    assert not any(p.requires_grad for n, p in network.named_parameters() if "lora_" not in n)
    assert tuned.save(tmp_path / "lora") == tmp_path / "lora"
    fresh = tiny.build(name)
    assert torch.equal(latents(fresh, given, x0), before)
    load_adapter(fresh, tmp_path / "lora")
    assert torch.allclose(latents(fresh, given, x0), after, atol=1e-6)
    merge_adapter(tuned.pipe)
    assert torch.allclose(latents(tuned.pipe, given, x0), after, atol=1e-4)
    tuned.pipe.save_pretrained(tmp_path / "merged")
    assert not [n for n in tuned.chain.network.state_dict() if "lora" in n]


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_all_weights_may_be_trained(name, tmp_path):
    """The frozen network is the base, bit for bit; the trained one is the pipeline's, and comes back from its folder."""
    tuned, given, x0, before = trained(name, rank=None, learning_rate=1e-3)
    after = latents(tuned.pipe, given, x0)
    assert (after - before).abs().max() > 1e-4
    assert tuned.save(tmp_path) == tmp_path
    fresh = type(tuned.pipe).from_pretrained(tmp_path)
    fresh.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(fresh, given, x0), after, atol=1e-6)
    setattr(tuned.pipe, tuned.chain.family.network, switched(tuned.chain.network, False))
    assert torch.equal(latents(tuned.pipe, given, x0), before)


@pytest.mark.parametrize("name", some("stable_diffusion", "flux"))
def test_frozen_weights_may_be_bfloat16(name):
    """The adapter is float32 and moves; the loss is that of float32 up to bfloat16's rounding of the network."""
    whole, *_ = trained(name, rounds=1)
    pipe = tiny.build(name).to(torch.bfloat16)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in whole.chain.rows.items()}
    quick = PipelineSettings(rounds=1, batch=4, steps=STEPS, rank=2, learning_rate=0.02, ema=0.0, clip=None)
    tuned = finetune_pipeline(pipe, brightness, whole.prompts, 100.0, settings=quick, rows=half)
    kinds = {"lora_" in n: p.dtype for n, p in tuned.chain.network.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert tuned.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.3)
    assert any(float(p.abs().max()) > 0 for n, p in tuned.chain.network.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_reward_rises_and_not_falls(sign):
    """Stable Diffusion, brightness: it moves the way it is rewarded, by more than four standard errors in the same noise."""
    tuned, *_ = trained("stable_diffusion", lambda x, texts: sign * brightness(x, texts), 200.0, rounds=12, batch=8)
    after, before = (tuned.judge({"b": brightness}, 32, 3, base) for base in (False, True))
    change = after.scores["b"] - before.scores["b"]
    assert sign * float(change.mean()) > 4 * float(change.std()) / 32**0.5
    assert float(after.kl.mean()) > 0 and float(before.kl.abs().max()) == 0
    assert len(tuned.history) == 12 and {"reward", "kl", "loss"} <= set(tuned.history[0])


def test_offloaded_paths_are_kept_on_the_host(monkeypatch):
    kept, fit = [], module.fit

    def recorded(method, *args):
        kept.append(method.keep)
        return fit(method, *args)

    monkeypatch.setattr(module, "fit", recorded)
    here, there = (trained("stable_diffusion_3", offload=offload)[0] for offload in (False, True))
    assert kept == [None, torch.device("cpu")] and here.history[-1]["loss"] == there.history[-1]["loss"]


def test_micro_batches_change_nothing():
    """Rollout, decoder, adjoint and loss a row at a time: the same history and the same adapter."""
    whole, *_ = trained("stable_diffusion_3")
    parts, *_ = trained("stable_diffusion_3", micro_batch=1)
    fitted, *_ = trained("stable_diffusion_3", micro_batch="fit", dropout=0.0)
    assert fitted.chain.micro_batch == 4  # all of them, where 20 GB are free
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    weights = [dict(t.chain.network.named_parameters()) for t in (whole, parts)]
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], atol=2e-3), key


def test_gradient_checkpointing_sees_the_adapter_that_was_on():
    """What the model computes again in the backward pass is under the same switch: losses and weights are the same."""
    plain, *_ = trained("stable_diffusion")
    pipe = tiny.build("stable_diffusion")
    pipe.unet.enable_gradient_checkpointing()
    again, *_ = trained("stable_diffusion", pipe=pipe)
    assert [row["loss"] for row in again.history] == pytest.approx([row["loss"] for row in plain.history], rel=1e-5)
    for a, b in zip(plain.chain.network.parameters(), again.chain.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("adjoint", [True, False])
def test_an_untrained_adapter_is_no_control_wherever_guidance_stands(control, adjoint):
    """u = 0 at the start, in the loss too; with guidance in the control only, a plain difference from the base is not 0."""
    pipe, _, chain = prepared("stable_diffusion", guidance=3.0 if adjoint else 1.0)
    network = add_adapter(pipe, 2, generator())
    x, k = chain.source(2, generator()), torch.tensor([1, 3])
    with torch.no_grad():
        base = chain.base_mean(k, x, prompt=PROMPT)
        here = Adapted(network, 3.0 if control else 1.0, relative=control != adjoint)
        assert torch.allclose(here.mean(chain, k, x, base_mean=base, prompt=PROMPT), base, atol=1e-6)
        if control != adjoint:
            plain = Adapted(network, here.guidance)
            assert not torch.allclose(plain.mean(chain, k, x, base_mean=base, prompt=PROMPT), base, atol=1e-3)


def test_a_run_is_resumed_exactly(tmp_path):
    """Three rounds are two, a stop and one more, bit for bit; the seed decides the adapter."""
    runs = []
    for stops in ([3], [2, 3]):
        folder = tmp_path / str(len(stops))
        for i, stop in enumerate(stops):
            tuned = finetune_pipeline(
                tiny.build("stable_diffusion"), brightness, ["a", "b"], 50.0,
                settings=PipelineSettings(rounds=3, batch=2, steps=3, rank=2, checkpoint_every=1), checkpoint=folder / "c",
                resume=i > 0, callback=lambda row, tuned: row["iteration"] + 1 == stop,  # noqa: B023
            )  # fmt: skip
        runs.append(tuned)
    for a, b in zip(*(r.chain.network.parameters() for r in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -1.0}, "strength must be finite and at least 0"),
        ({"rows": {"text": torch.zeros(2, 8, 16)}}, "2 prompts need 3 rows"),
        ({"prompts": []}, "at least one"),
        ({"prompts": "a cat"}, "must be a list of texts"),
        ({"prompts": ["a", None]}, "prompt 2 is not a text"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"reward": lambda x, texts: x.detach().flatten(1).mean(1)}, "detached"),
        ({"settings": PipelineSettings(targets=("nowhere",))}, "no layer named nowhere"),
    ],
)
def test_misuse(change, message):
    call = {"reward": brightness, "prompts": ["a", "b"], "strength": 1.0} | change
    pipe = tiny.build("stable_diffusion")
    names = list(pipe.unet.state_dict())
    with pytest.raises(TiltflowError, match=message):
        finetune_pipeline(pipe, **call)
    assert list(pipe.unet.state_dict()) == names


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"micro_batch": 0}, {"micro_batch": "half"}, {"rounds": 0}, {"batch": -5}, {"steps": 0}, {"ema": 2.0},
        {"clip": -1.0}, {"learning_rate": -1.0}, {"learning_rate": float("nan")}, {"guidance": float("inf")},
        {"guidance_in": ("everywhere",)}, {"dropout": 1.5}, {"dropout": float("nan")}, {"per_prompt": 0}, {"targets": ()},
        {"random_steps": 5}, {"last_steps": 30, "random_steps": 30}, {"max_cost_gradient": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_checked_where_they_are_stored(wrong):
    with pytest.raises(TiltflowError, match=next(iter(wrong))):
        PipelineSettings(**wrong)


@pytest.mark.parametrize("rank", [2, None])
def test_an_interrupted_pipeline_is_as_it_was(rank):
    """Bit for bit, so that the next attempt is not refused; and the global generator is not drawn from."""
    pipe, given, chain = prepared("stable_diffusion")
    x0 = chain.source(2, generator())
    before, network = latents(pipe, given, x0), pipe.unet

    def interrupt(row, tuned):
        raise KeyboardInterrupt

    torch.manual_seed(5)
    state = torch.get_rng_state()
    quick = PipelineSettings(rounds=2, batch=2, steps=3, rank=rank, learning_rate=0.1)
    with pytest.raises(KeyboardInterrupt):
        finetune_pipeline(pipe, brightness, ["a", "b"], 50.0, settings=quick, callback=interrupt)
    assert torch.equal(torch.get_rng_state(), state) and pipe.unet is network
    assert torch.equal(latents(pipe, given, x0), before)
    finetune_pipeline(pipe, brightness, ["a", "b"], 50.0, settings=quick)


def test_stable_audio_takes_a_negative_prompt():
    """Its embeddings come first from the pipeline; without one the row is zero."""
    pipe = tiny.build("stable_audio")
    positive, negative = torch.randn(2, 2, 6, 16, generator=generator())
    with torch.no_grad():
        plain = family_of(pipe).encode(pipe, {"prompt_embeds": positive})
        both = family_of(pipe).encode(pipe, {"prompt_embeds": positive, "negative_prompt_embeds": negative})
        other = family_of(pipe).encode(pipe, {"prompt_embeds": negative})
    assert torch.equal(plain["text"][-1], torch.zeros_like(plain["text"][-1]))
    assert torch.allclose(both["text"][:2], plain["text"][:2]) and torch.allclose(both["text"][2], other["text"][0])
    assert both["duration"].shape == plain["duration"].shape == (3, 1, 32)


def test_a_second_adapter_is_refused_and_none_is_not_saved(tmp_path):
    pipe = tiny.build("stable_diffusion")
    with pytest.raises(TiltflowError, match="no adapter to save"):
        save_adapter(pipe, tmp_path)
    add_adapter(pipe, 2, generator())
    with pytest.raises(TiltflowError, match="has an adapter already"):
        add_adapter(pipe, 2, generator())
    with pytest.raises(TiltflowError, match="holds no adapter"):
        load_adapter(tiny.build("stable_audio"), tmp_path)


def test_a_reward_is_checked_on_the_pipeline():
    """Brightness passes, and λ is suggested where e^{λr} leaves 5 % of the samples; a detached one fails by name."""
    pipe = tiny.build("stable_diffusion")
    quick = PipelineSettings(steps=3)
    found = check_pipeline_reward(pipe, brightness, "a", 100, settings=quick)
    assert found.status in ("pass", "warn") and found.suggestion > 0
    row = next(r for r in found.strengths if r.strength == pytest.approx(found.suggestion))
    assert row.ess == pytest.approx(0.05, rel=0.1)
    detached = check_pipeline_reward(pipe, lambda x, texts: brightness(x, texts).detach(), "a", 100, settings=quick)
    assert detached.status == "fail"
    with pytest.raises(TiltflowError, match="at least 100 samples"):
        check_pipeline_reward(pipe, brightness, "a", 10, settings=quick)


def test_settings_go_where_they_belong(monkeypatch):
    """The paper's steps (10 and 10 of 40) and clip (1.6 λ²); dropout, buffer, gradient steps; rows of a batch at a time."""
    seen = []
    monkeypatch.setattr(module, "fit", lambda *args: seen.append(args) or [])
    many = PipelineSettings(batch=3, per_prompt=2, dropout=0.25, gradient_steps=5, minibatch=7, buffer_rounds=2, ema=0.5)
    finetune_pipeline(tiny.build("stable_diffusion"), brightness, ["a", "b"], 10.0, settings=many)
    method, _, training, *_ = seen[0]
    assert (method.last_steps, method.random_steps, method.batch, method.clip) == (10, 10, 3, pytest.approx(160.0))
    assert method.conditions.dropout == 0.25 and method.conditions.per_prompt == 2 and not method.importance
    assert training.buffer_rounds == 2 and training.warmup == 5
    assert (training.gradient_steps, training.minibatch, training.accumulate, training.ema) == (5, 7, 3, 0.5)
    few = PipelineSettings(steps=5, last_steps=2, random_steps=1, clip=None, micro_batch=2)
    finetune_pipeline(tiny.build("stable_diffusion"), brightness, ["a"], 10.0, settings=few)
    method, _, training, *_ = seen[1]
    assert (method.last_steps, method.random_steps, method.clip, training.accumulate) == (2, 1, None, 2)
