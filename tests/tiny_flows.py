"""Flow-matching pipelines of diffusers with random weights, built without a network: arguments of their calls, and rows.

A builder returns (pipeline, arguments of its call, rows of n prompts). Rows are embeddings, or texts for those with encoders.
"""

import tiny_pipelines as tiny
import torch

import diffusers as D  # isort: skip


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def mask(n, length, kind=torch.long):
    return torch.ones(n, length, dtype=kind)


def flow(**options):
    return D.FlowMatchEulerDiscreteScheduler(**options)


def vae(channels=4, shift=True):
    made = tiny.vae(channels)
    if shift:
        made.register_to_config(shift_factor=0.1)
    return made


def image(n, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(8))


NO_CLIP = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
SMALL = {"height": 16, "width": 16}


# ------------------------------------------------------------------------------------------------------------------- images


def sd3(kind=D.StableDiffusion3Pipeline, **more):
    pipe = tiny.stable_diffusion_3()
    parts = dict(pipe.components) | {"vae": vae()} | more
    return kind(**parts), SMALL, lambda n: {"prompt_embeds": normal(n, 8, 32), "pooled_prompt_embeds": normal(n, 32)}


def flux_transformer(channels=16, out=None, guidance=True):
    return D.FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=out, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )  # fmt: skip


def flux(kind=D.FluxPipeline, channels=16, **more):
    parts = {"vae": vae(), "transformer": flux_transformer(channels, 16), "scheduler": flow(shift=3.0)}
    pipe = kind(**NO_CLIP | parts | more)
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 16), "pooled_prompt_embeds": normal(n, 16)}


def flux_with_text():
    clip = {"text_encoder": tiny.T.CLIPTextModel(tiny.clip_config()), "tokenizer": tiny.clip_tokenizer()}
    pipe, call, _ = flux(**clip, text_encoder_2=tiny.t5(), tokenizer_2=tiny.bytes_tokenizer())
    return pipe, call | {"max_sequence_length": 8}, None


def flux_image(kind, **more):
    pipe, call, rows = flux(kind, **more)
    return pipe, call, lambda n: rows(n) | {"image": image(n)}


def kontext():
    pipe, call, rows = flux_image(D.FluxKontextPipeline)
    return pipe, call | {"max_area": 256, "_auto_resize": False}, rows


def control():
    pipe, call, rows = flux(D.FluxControlPipeline, 32)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n)}


def from_image(kind, masked=False, build=flux, **more):
    pipe, call, rows = build(kind, **more)
    extra = {"mask_image": torch.ones(1, 1, 16, 16)} if masked else {}
    return pipe, call | {"strength": 1.0} | extra, lambda n: rows(n) | {"image": image(n)}


def fill():
    pipe, call, rows = flux(D.FluxFillPipeline, 16 + 16 + 16)
    white = torch.ones(1, 1, 16, 16)
    return pipe, call, lambda n: rows(n) | {"image": image(n), "mask_image": white.expand(n, 1, 16, 16)}


def chroma(kind=D.ChromaPipeline):
    network = D.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    pipe = kind(**NO_TEXT, vae=vae(), transformer=network, scheduler=flow())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 16), "prompt_attention_mask": mask(n, 6, torch.bool)}


def qwen_vae():
    return D.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1] * 4, latents_std=[1.3] * 4,
    )  # fmt: skip


def qwen(kind=D.QwenImagePipeline, **more):
    network = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    pipe = kind(**NO_TEXT, transformer=network, vae=qwen_vae(), scheduler=flow(), **more)
    return pipe, {"height": 32, "width": 32}, lambda n: {
        "prompt_embeds": normal(n, 6, 16), "prompt_embeds_mask": mask(n, 6),
    }  # fmt: skip


def qwen_edit():
    pipe, call, rows = qwen(D.QwenImageEditPipeline, processor=None)
    return pipe, call, lambda n: rows(n) | {"image": image(n, 32)}


def dc_vae(channels=4):
    return D.AutoencoderDC(
        in_channels=3, latent_channels=channels, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


def sana(kind=D.SanaPipeline, **more):
    network = D.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32,
    )  # fmt: skip
    pipe = kind(**NO_TEXT, transformer=network, vae=dc_vae(), scheduler=more.get("scheduler", flow(shift=7.0)))
    return pipe, {"height": 32, "width": 32, "use_resolution_binning": False}, lambda n: {
        "prompt_embeds": normal(n, 6, 8), "prompt_attention_mask": mask(n, 6),
    }  # fmt: skip


def sana_solver():
    """With the solver of its release, on flow sigmas."""
    return sana(scheduler=D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    ))  # fmt: skip


def auraflow():
    network = D.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    pipe = D.AuraFlowPipeline(**NO_TEXT, vae=tiny.vae(), transformer=network, scheduler=flow())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 32), "prompt_attention_mask": mask(n, 6)}


def lumina2():
    network = D.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128], cap_feat_dim=8,
    )  # fmt: skip
    pipe = D.Lumina2Pipeline(**NO_TEXT, transformer=network, scheduler=flow(), vae=vae())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 8), "prompt_attention_mask": mask(n, 6, torch.bool)}


def lumina():
    network = D.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True, cross_attention_dim=32,
        scaling_factor=1.0,
    )  # fmt: skip
    pipe = D.LuminaPipeline(**NO_TEXT, transformer=network, scheduler=flow(), vae=vae())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 32), "prompt_attention_mask": mask(n, 6, torch.bool)}


def cogview4(kind=D.CogView4Pipeline, channels=4):
    network = D.CogView4Transformer2DModel(
        patch_size=2, in_channels=channels, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = kind(**NO_TEXT, vae=tiny.vae(), transformer=network, scheduler=scheduler)
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 16, 32)}


def cogview4_control():
    pipe, call, rows = cogview4(D.CogView4ControlPipeline, 8)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n)}


def z_image():
    """With a text encoder, whose rows are of as many tokens as the text has."""
    network = D.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(network, name))
    t = tiny.T
    encoder = t.Qwen3Model(t.Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, head_dim=8, max_position_embeddings=512,
    ))  # fmt: skip
    words = tiny.bytes_tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pipe = D.ZImagePipeline(
        transformer=network, vae=vae(), scheduler=flow(), text_encoder=encoder, tokenizer=words
    )
    return pipe, SMALL | {"max_sequence_length": 32}, None


# ------------------------------------------------------------------------------------------------------------------- videos


def wan_transformer(channels=16):
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=16, text_dim=32,
        freq_dim=256, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def wan_vae():
    return D.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan(kind=D.WanPipeline, scheduler=None, second=False, **more):
    pipe = kind(
        **NO_TEXT, transformer=wan_transformer(), vae=wan_vae(), scheduler=scheduler or flow(shift=7.0),
        transformer_2=wan_transformer() if second else None, **more,
    )  # fmt: skip
    return pipe, SMALL | {"num_frames": 5}, lambda n: {"prompt_embeds": normal(n, 6, 32)}


def wan_2_2():
    return wan(second=True, boundary_ratio=0.875)


def wan_unipc():
    return wan(scheduler=D.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
        disable_corrector=[0, 1, 2, 3],
    ))  # fmt: skip


def ltx_vae():
    made = D.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    made.use_framewise_encoding = made.use_framewise_decoding = False
    return made


def ltx(kind=D.LTXPipeline):
    network = D.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    pipe = kind(**NO_TEXT, transformer=network, vae=ltx_vae(), scheduler=flow())
    return pipe, {"height": 32, "width": 32, "num_frames": 9}, lambda n: {
        "prompt_embeds": normal(n, 6, 32), "prompt_attention_mask": mask(n, 6),
    }  # fmt: skip


def ltx_image():
    pipe, call, rows = ltx(D.LTXImageToVideoPipeline)
    return pipe, call, lambda n: rows(n) | {"image": image(n, 32)}


def mochi():
    network = D.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16, in_channels=12,
        out_channels=None, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=16,
    )  # fmt: skip
    decoder = D.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = D.MochiPipeline(**NO_TEXT, transformer=network, vae=decoder, scheduler=flow())
    return pipe, SMALL | {"num_frames": 7}, lambda n: {
        "prompt_embeds": normal(n, 16, 32), "prompt_attention_mask": mask(n, 16, torch.bool),
    }  # fmt: skip


def hunyuan_video():
    network = D.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    decoder = D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, act_fn="silu",
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    pipe = D.HunyuanVideoPipeline(**NO_CLIP, transformer=network, vae=decoder, scheduler=flow(shift=7.0))
    return pipe, SMALL | {"num_frames": 5}, lambda n: {
        "prompt_embeds": normal(n, 6, 16), "pooled_prompt_embeds": normal(n, 8), "prompt_attention_mask": mask(n, 6),
    }  # fmt: skip


BUILDERS = {
    "StableDiffusion3Pipeline": sd3,
    "StableDiffusion3Img2ImgPipeline": lambda: from_image(D.StableDiffusion3Img2ImgPipeline, build=sd3),
    "StableDiffusion3InpaintPipeline": lambda: from_image(D.StableDiffusion3InpaintPipeline, True, sd3),
    "FluxPipeline": flux,
    "FluxPipeline with texts": flux_with_text,
    "FluxImg2ImgPipeline": lambda: from_image(D.FluxImg2ImgPipeline),
    "FluxInpaintPipeline": lambda: from_image(D.FluxInpaintPipeline, True),
    "FluxKontextPipeline": kontext,
    "FluxControlPipeline": control,
    "FluxFillPipeline": fill,
    "ChromaPipeline": chroma,
    "ChromaImg2ImgPipeline": lambda: from_image(D.ChromaImg2ImgPipeline, build=chroma),
    "QwenImagePipeline": qwen,
    "QwenImageImg2ImgPipeline": lambda: from_image(D.QwenImageImg2ImgPipeline, build=qwen),
    "QwenImageInpaintPipeline": lambda: from_image(D.QwenImageInpaintPipeline, True, qwen),
    "QwenImageEditPipeline": qwen_edit,
    "SanaPipeline": sana,
    "SanaPipeline with its solver": sana_solver,
    "AuraFlowPipeline": auraflow,
    "Lumina2Pipeline": lumina2,
    "LuminaPipeline": lumina,
    "CogView4Pipeline": cogview4,
    "CogView4ControlPipeline": cogview4_control,
    "ZImagePipeline": z_image,
    "WanPipeline": wan,
    "WanPipeline 2.2": wan_2_2,
    "WanPipeline with UniPC": wan_unipc,
    "LTXPipeline": ltx,
    "LTXImageToVideoPipeline": ltx_image,
    "MochiPipeline": mochi,
    "HunyuanVideoPipeline": hunyuan_video,
}


def build(name, seed=0):
    """The pipeline with weights of its own, nothing trainable in it; arguments of its call; and rows of n prompts."""
    torch.manual_seed(seed)
    pipe, call, rows = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe, call, rows
