"""diffusers pipelines of the sizes that people use, with random weights: nothing is downloaded, prompts are embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]
"""Of one prompt's embeddings, by name."""
TRANSFORMERS = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def vae(channels: int, shift: float = 0.0) -> Any:
    """The decoder of all of them; latents have an eighth of the pixels."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, shift_factor=shift, sample_size=512,
    )  # fmt: skip


def small_vae() -> Any:
    """One of a few channels."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def stable_diffusion(unet: Any, decoder: Any) -> Any:
    """Version 1.5."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=decoder, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd15() -> tuple[Any, Shapes]:
    """0.86 B parameters, 512 × 512."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return stable_diffusion(unet, vae(4)), {"text": (77, 768)}


def sdxl() -> tuple[Any, Shapes]:
    """2.6 B parameters, 1024 × 1024."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=[5, 10, 20],
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(4), unet=unet, scheduler=scheduler, add_watermarker=False, **TRANSFORMERS
    )
    return pipe, {"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)}


def stable_diffusion_3(transformer: Any, decoder: Any) -> Any:
    """The pipeline of a transformer."""
    import diffusers

    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=decoder,
        text_encoder_3=None, tokenizer_3=None, **TRANSFORMERS,
    )  # fmt: skip


def sd3() -> tuple[Any, Shapes]:
    """2 B parameters, 1024 × 1024."""
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=192,
    )  # fmt: skip
    return stable_diffusion_3(transformer, vae(16, 0.0609)), {"text": (333, 4096), "pooled": (2048,)}


def flux() -> tuple[Any, Shapes]:
    """12 B parameters, 1024 × 1024: 19 and 38 blocks."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    pipe = diffusers.FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae(16, 0.1159), **TRANSFORMERS)
    return pipe, {"text": (512, 4096), "pooled": (768,)}


def tiny() -> tuple[Any, Shapes]:
    """A U-Net of a few thousand parameters."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    )  # fmt: skip
    return stable_diffusion(unet, small_vae()), {"text": (8, 16)}


def tinyflow() -> tuple[Any, Shapes]:
    """A transformer of two blocks."""
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    return stable_diffusion_3(transformer, small_vae()), {"text": (8, 32), "pooled": (32,)}


SIZES: dict[str, Callable[[], tuple[Any, Shapes]]] = {
    "sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "tiny": tiny, "tinyflow": tinyflow,
}  # fmt: skip
LARGE = ("sdxl", "sd3", "flux")
"""Those whose activations are computed again in the backward pass."""


def built(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """The pipeline on its device, and embeddings of two prompts and the negative one."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            pipe, shapes = SIZES[name]()
    finally:
        torch.set_default_dtype(before)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    generator = torch.Generator(device).manual_seed(5)
    rows = {k: torch.randn(3, *s, generator=generator, device=device).to(dtype) for k, s in shapes.items()}
    if "time_ids" in rows:
        rows["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 3, device=device).to(dtype)
    if name == "flux":
        pipe.default_sample_size = 128
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    if name in LARGE:
        network.enable_gradient_checkpointing()
    return pipe, rows
