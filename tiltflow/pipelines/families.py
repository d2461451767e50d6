"""The pipelines of diffusers that can be fine-tuned: how each encodes prompts, calls its network and decodes latents.

Rows of a prompt are what the network wants beside x and the time; their last row is the negative prompt's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.embeddings import Rows
from tiltflow.pipelines.networks import NETWORKS, names_of, whole
from tiltflow.pipelines.recorded import Recorded
from tiltflow.pipelines.schedules import FLOWS

DECODERS = ("vae", "vocoder")
"""Components that make images or audio of latents."""


class Family(Protocol):
    """``network`` names the pipeline's component that is trained."""

    @property
    def network(self) -> str: ...

    def bound(self, pipe: Any, rows: Rows) -> Family:
        """The family for these rows."""
        ...

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        """Of one sample of latents."""
        ...

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """What the pipeline passes to ``set_timesteps`` besides the number of steps."""
        ...

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        """Rows (n + 1, …) of n prompts: ``prompts`` are arguments of the pipeline's ``encode_prompt``."""
        ...

    def predict(self, pipe: Any, network: nn.Module, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The output at x (B, *event), timestep (B,) of ``network``: the pipeline's, or another of its kind."""
        ...

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or audio (B, channels, samples). Differentiable."""
        ...


def _height_width(pipe: Any, network: Any) -> tuple[int, int]:
    size = network.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _image(pipe: Any, latents: Tensor) -> Tensor:
    shift = pipe.vae.config.get("shift_factor") or 0.0
    latents = (latents / pipe.vae.config.scaling_factor + shift).to(pipe.vae.dtype)
    return (pipe.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.decode(x, return_dict=False)[0]


def _in_single(vae: Any, x: Tensor) -> Tensor:
    """Decoded with weights in float32, which the decoder is left without."""
    whole = {f"vae.{name}": p.float() for name, p in [*vae.named_parameters(), *vae.named_buffers()]}
    return torch.func.functional_call(_Decoder(vae), whole, (x.float(),))


def _with_negative(positive: Tensor, negative: Tensor) -> Tensor:
    return torch.cat([positive, negative[:1]])


class StableDiffusion:
    """Stable Diffusion 1 and 2: rows ``text``."""

    network = "unet"

    def bound(self, pipe: Any, rows: Rows) -> Family:
        return self

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        return (pipe.unet.config.in_channels, *_height_width(pipe, pipe.unet))

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        return {}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        text, negative = pipe.encode_prompt(
            device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True, **{"prompt": None} | prompts
        )
        return {"text": _with_negative(text, negative)}

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        return network(x, timestep, encoder_hidden_states=rows["text"], return_dict=False)[0]

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        return _image(pipe, x)


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: rows ``text``, ``pooled``, ``time_ids`` (no cropping)."""

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        text, negative, pooled, negative_pooled = pipe.encode_prompt(
            device=pipe.device, do_classifier_free_guidance=True, **{"prompt": None} | prompts
        )
        height, width = (pipe.vae_scale_factor * side for side in _height_width(pipe, pipe.unet))
        projected = pooled.shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim
        size = (height, width)
        ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=projected)
        return {
            "text": _with_negative(text, negative),
            "pooled": _with_negative(pooled, negative_pooled),
            "time_ids": ids.to(text.device).repeat(len(text) + 1, 1),
        }

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        added = {"text_embeds": rows["pooled"], "time_ids": rows["time_ids"]}
        return network(
            x, timestep, encoder_hidden_states=rows["text"], added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        vae, config = pipe.vae, pipe.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            mean, std = (x.new_tensor(v).reshape(1, -1, 1, 1) for v in (mean, std))
            x = x * std / config.scaling_factor + mean
        else:
            x = x / config.scaling_factor
        half = vae.dtype == torch.float16 and config.get("force_upcast")
        image = _in_single(vae, x) if half else vae.decode(x.to(vae.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


class StableDiffusion3:
    """Stable Diffusion 3: rows ``text``, ``pooled``."""

    network = "transformer"

    def bound(self, pipe: Any, rows: Rows) -> Family:
        return self

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        return (pipe.transformer.config.in_channels, *_height_width(pipe, pipe.transformer))

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        if not pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.event_shape(pipe)
        patch = pipe.transformer.config.patch_size
        return {"mu": _dynamic_shift(pipe.scheduler, (height // patch) * (width // patch), 1.16)}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        text, negative, pooled, negative_pooled = pipe.encode_prompt(
            device=pipe.device,
            do_classifier_free_guidance=True,
            **{"prompt": None, "prompt_2": None, "prompt_3": None} | prompts,
        )
        return {"text": _with_negative(text, negative), "pooled": _with_negative(pooled, negative_pooled)}

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        return network(
            hidden_states=x, timestep=timestep, encoder_hidden_states=rows["text"], pooled_projections=rows["pooled"],
            return_dict=False,
        )[0]  # fmt: skip

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        return _image(pipe, x)


class Flux:
    """Flux: rows ``text``, ``pooled``; latents packed two by two. Distilled guidance is the pipeline's default."""

    network = "transformer"
    distilled_guidance = 3.5

    def _size(self, pipe: Any) -> tuple[int, int]:
        side = 2 * (int(pipe.default_sample_size) // 2)
        return side, side

    def bound(self, pipe: Any, rows: Rows) -> Family:
        return self

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        height, width = self._size(pipe)
        return (height // 2 * (width // 2), pipe.transformer.config.in_channels)

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        mu = _dynamic_shift(pipe.scheduler, self.event_shape(pipe)[0], 1.15)
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        given = {"prompt": None, "prompt_2": None} | prompts
        negative = {key.removeprefix("negative_"): given.pop(key) for key in [*given] if key.startswith("negative_")}
        text, pooled, _ = pipe.encode_prompt(device=pipe.device, **given)
        if not negative and given["prompt"] is None:
            raise TiltflowError(
                "Flux has no embedding of its own for no prompt: with prompt_embeds, give negative_prompt_embeds and "
                "negative_pooled_prompt_embeds too."
            )
        negative = negative or {"prompt": [""]}
        other, other_pooled, _ = pipe.encode_prompt(
            device=pipe.device, **{"prompt": None, "prompt_2": None} | negative
        )
        return {"text": _with_negative(text, other), "pooled": _with_negative(pooled, other_pooled)}

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        height, width = self._size(pipe)
        guidance = x.new_full((len(x),), self.distilled_guidance) if network.config.guidance_embeds else None
        return network(
            hidden_states=x, timestep=timestep / 1000, guidance=guidance, pooled_projections=rows["pooled"],
            encoder_hidden_states=rows["text"], txt_ids=x.new_zeros(rows["text"].shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype), return_dict=False,
        )[0]  # fmt: skip

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        height, width = (side * pipe.vae_scale_factor for side in self._size(pipe))
        return _image(pipe, pipe._unpack_latents(x, height, width, pipe.vae_scale_factor))


class StableAudio:
    """Stable Audio: rows ``text`` (with the duration's), ``duration``. The whole length of the model is generated."""

    network = "transformer"

    def bound(self, pipe: Any, rows: Rows) -> Family:
        return self

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        return (pipe.transformer.config.in_channels, int(pipe.transformer.config.sample_size))

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        return {}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        given = {"prompt": None} | prompts
        negative = any(name.startswith("negative") for name in given)
        text = pipe.encode_prompt(device=pipe.device, do_classifier_free_guidance=negative, **given)
        seconds = self.event_shape(pipe)[1] * pipe.vae.hop_length / pipe.vae.config.sampling_rate
        start, end = pipe.encode_duration(0.0, seconds, pipe.device, False, len(text))
        text = torch.cat([text, start, end], 1)
        duration = torch.cat([start, end], 2)
        if negative:  # they come first
            n = len(text) // 2
            return {"text": _with_negative(text[n:], text[:n]), "duration": _with_negative(duration[n:], duration[:n])}
        return {"text": _with_negative(text, torch.zeros_like(text)), "duration": _with_negative(duration, duration)}

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        length = x.shape[2] + rows["duration"].shape[1]
        rotary = get_1d_rotary_pos_embed(pipe.rotary_embed_dim, length, use_real=True, repeat_interleave_real=False)
        return network(
            x, timestep, encoder_hidden_states=rows["text"], global_hidden_states=rows["duration"], rotary_embedding=rotary,
            return_dict=False,
        )[0]  # fmt: skip

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        return pipe.vae.decode(x.to(pipe.vae.dtype)).sample.float()


class AudioLDM2:
    """AudioLDM 2: rows ``text``, ``mask``, ``generated``; about 10 seconds, as the pipeline's default."""

    network = "unet"
    seconds = 10.24

    def bound(self, pipe: Any, rows: Rows) -> Family:
        return self

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        config = pipe.vocoder.config
        bins = config.model_in_dim // pipe.vae_scale_factor
        hop = 1.0
        for rate in config.upsample_rates:
            hop *= rate
        frames = int(self.seconds * config.sampling_rate / hop)
        frames = -(-frames // pipe.vae_scale_factor)
        return (pipe.unet.config.in_channels, frames, bins)

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        return {}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        both = pipe.encode_prompt(
            device=pipe.device, num_waveforms_per_prompt=1, do_classifier_free_guidance=True, **{"prompt": None} | prompts
        )
        text, mask, generated = ((v[len(v) // 2 :], v[: len(v) // 2]) for v in both)  # the negative ones come first
        return {"text": _with_negative(*text), "mask": _with_negative(*mask), "generated": _with_negative(*generated)}

    def predict(self, pipe: Any, network: Any, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        return network(
            x, timestep, encoder_hidden_states=rows["generated"], encoder_hidden_states_1=rows["text"],
            encoder_attention_mask_1=rows["mask"], return_dict=False,
        )[0]  # fmt: skip

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        mel = pipe.vae.decode((x / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
        return pipe.vocoder(mel.squeeze(1).to(pipe.vocoder.dtype)).float()[:, None]


def _dynamic_shift(scheduler: Any, tokens: int, most: float) -> float:
    """μ of the shift e^μ for a number of tokens: linear between the scheduler's two anchors, as its pipeline has it."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return low + (high - low) * (tokens - few) / (many - few)


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "FluxPipeline": Flux(),
    "StableAudioPipeline": StableAudio(),
    "AudioLDM2Pipeline": AudioLDM2(),
}
"""By the pipeline's class."""


def family_of(pipe: Any, call: Mapping[str, Any] | None = None) -> Family:
    """The family of a pipeline; with arguments for its own ``call``, or of another class, the one that records that call.

    Raises:
        TiltflowError: a pipeline that none can hold.
    """
    name, scheduler = type(pipe).__name__, type(getattr(pipe, "scheduler", None)).__name__
    if name in FAMILIES and not call:
        return FAMILIES[name]
    network = next((n for n in NETWORKS if isinstance(getattr(pipe, n, None), nn.Module)), None)
    taken = inspect.signature(type(pipe).__call__).parameters
    flows = scheduler in FLOWS or getattr(getattr(pipe, "scheduler", None), "config", {}).get("use_flow_sigmas")
    if network is None or "latents" not in taken or not flows:
        what = f"takes no arguments of its call ({', '.join(call)})" if call and name in FAMILIES else "is not supported"
        raise TiltflowError(
            f"pipeline {name} {what}: these are supported, {', '.join(FAMILIES)}, and those of flow matching whose call "
            "takes latents."
        )
    if unknown := [key for key in call or {} if key not in taken]:
        raise TiltflowError(f"the call of {name} takes no {unknown[0]}; it takes {', '.join([*taken][1:])}.")
    return Recorded(network, dict(call or {}))


def network_of(pipe: Any) -> Any:
    """The network that is trained, out of what ``torch.compile`` has made of it."""
    return whole(pipe, family_of(pipe).network, plain=True)


def require_resident(pipe: Any) -> None:
    """Raise TiltflowError if network or decoder are moved to a device and away again at every call."""
    needed = (*names_of(pipe, family_of(pipe).network), *DECODERS)
    for name, part in ((name, part) for name, part in pipe.components.items() if name in needed and part is not None):
        hooks = [getattr(part, "_hf_hook", None), *getattr(getattr(part, "_hf_hook", None), "hooks", ())]
        inside = part.modules() if isinstance(part, nn.Module) else ()
        groups = {hook for m in inside for hook in getattr(getattr(m, "_diffusers_hook", None), "hooks", ())}
        offloads = any(type(hook).__name__ == "CpuOffload" or getattr(hook, "offload", False) for hook in hooks)
        if offloads or any("offload" in hook for hook in groups):
            raise TiltflowError(
                f"the pipeline's {name} is offloaded between its calls, which training would pay for at every step: leave "
                "enable_model_cpu_offload and its kin out (pipe.remove_all_hooks(), pipe.to(device)); text encoders "
                "are on the host while the network is trained, and with offload=True so are the paths."
            )


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline's network is; its encoders may be elsewhere."""
    return getattr(pipe, family_of(pipe).network).device
