"""Flow-matching pipelines of diffusers with random weights, built without a network: arguments of their calls, and rows.

A builder returns (pipeline, arguments of its call, rows of n prompts). Rows are embeddings, None where texts are encoded.
"""

import inspect

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
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken} | {"vae": vae()} | more
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


def kontext():
    pipe, call, rows = flux(D.FluxKontextPipeline)
    return pipe, call | {"max_area": 256, "_auto_resize": False}, lambda n: rows(n) | {"image": image(n)}


def control():
    pipe, call, rows = flux(D.FluxControlPipeline, 32)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n)}


def from_image(kind, build=flux):
    pipe, call, rows = build(kind)
    return pipe, call | {"strength": 1.0}, lambda n: rows(n) | {"image": image(n)}


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
    pipe = kind(**NO_TEXT, transformer=network, vae=dc_vae(), **{"scheduler": flow(shift=7.0)} | more)
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


def z_image(kind=D.ZImagePipeline):
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
    pipe = kind(
        transformer=network, vae=vae(), scheduler=flow(), text_encoder=encoder, tokenizer=words
    )
    return pipe, SMALL | {"max_sequence_length": 32}, None


# ------------------------------------------------------------------------------------------------------------------- videos


def wan_transformer(channels=16):
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
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
    pipe = D.HunyuanVideoPipeline(**NO_CLIP, transformer=network, vae=hunyuan_vae(), scheduler=flow(shift=7.0))
    return pipe, SMALL | {"num_frames": 5}, lambda n: {
        "prompt_embeds": normal(n, 6, 16), "pooled_prompt_embeds": normal(n, 8), "prompt_attention_mask": mask(n, 6),
    }  # fmt: skip


def hunyuan_vae():
    return D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, act_fn="silu",
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- images and videos, the others


def flux2(kind=D.Flux2Pipeline, guidance=True):
    network = D.Flux2Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    decoder = D.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    torch.nn.init.normal_(decoder.bn.running_mean)
    pipe = kind(**NO_TEXT, transformer=network, vae=decoder, scheduler=flow())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 16)}


def bria():
    network = D.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=None, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe = D.BriaPipeline(**NO_TEXT, transformer=network, vae=vae(), scheduler=flow())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 16)}


def ovis():
    network = D.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = D.OvisImagePipeline(**NO_TEXT, transformer=network, vae=vae(), scheduler=flow())
    return pipe, SMALL, lambda n: {"prompt_embeds": normal(n, 6, 16)}


def prx():
    network = D.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )
    pipe = D.PRXPipeline(
        transformer=network, scheduler=flow(), text_encoder=None, tokenizer=None, vae=vae(), default_sample_size=16
    )
    return pipe, SMALL | {"use_resolution_binning": False}, lambda n: {
        "prompt_embeds": normal(n, 6, 8), "prompt_attention_mask": mask(n, 6, torch.bool),
    }  # fmt: skip


def prx_pixel():
    network = D.PRXTransformer2DModel(
        in_channels=3, patch_size=2, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )
    pipe = D.PRXPixelPipeline(
        transformer=network, scheduler=flow(), text_encoder=None, tokenizer=None, default_sample_size=16
    )
    return pipe, SMALL | {"use_resolution_binning": False}, lambda n: {
        "prompt_embeds": normal(n, 6, 8), "prompt_attention_mask": mask(n, 6, torch.bool),
    }  # fmt: skip


def video_to_video():
    pipe = D.WanVideoToVideoPipeline(**NO_TEXT, transformer=wan_transformer(), vae=wan_vae(), scheduler=flow(shift=7.0))
    frames = torch.rand(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    return pipe, SMALL | {"strength": 1.0}, lambda n: {
        "prompt_embeds": normal(n, 6, 32), "video": frames.expand(n, 5, 3, 16, 16),
    }  # fmt: skip


def hidream():
    network = D.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1), force_inference_output=True,
    )  # fmt: skip
    none = {f"{kind}{i}": None for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4")}
    pipe = D.HiDreamImagePipeline(**none, transformer=network, vae=vae(), scheduler=flow())

    def rows(n):  # Llama's have the layers first: as encode_prompt returns them
        t5, llama, pooled = normal(n, 6, 32), normal(n, 2, 6, 16), normal(n, 64)
        said = {"encode_prompt.6.0.rows0": t5, "encode_prompt.6.2.rows1": llama, "encode_prompt.6.4.rows0": pooled}
        return said, {
            "prompt_embeds_t5": t5, "prompt_embeds_llama3": llama.movedim(1, 0), "pooled_prompt_embeds": pooled,
        }  # fmt: skip

    return pipe, SMALL, rows


def sana_video(kind=D.SanaVideoPipeline):
    network = D.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_layers=1, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_size=8,
        rope_max_seq_len=32,
    )  # fmt: skip
    pipe = kind(**NO_TEXT, transformer=network, vae=wan_vae(), scheduler=flow())
    return pipe, {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False}, lambda n: {
        "prompt_embeds": normal(n, 6, 8), "prompt_attention_mask": mask(n, 6),
    }  # fmt: skip


def flux_controlnet(kind=D.FluxControlNetPipeline):
    part = D.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe, call, rows = flux(kind, controlnet=part)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n)}


def sd3_controlnet():
    part = D.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    pipe, call, rows = sd3(D.StableDiffusion3ControlNetPipeline, controlnet=part)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n)}


def qwen_controlnet():
    part = D.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    pipe, call, rows = qwen(D.QwenImageControlNetPipeline, controlnet=part)
    return pipe, call, lambda n: rows(n) | {"control_image": image(n, 32)}


def control_from_image():
    pipe, call, rows = flux(D.FluxControlImg2ImgPipeline, 32)
    return pipe, call | {"strength": 1.0}, lambda n: rows(n) | {"image": image(n), "control_image": image(n)}


BUILDERS = {
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": lambda: flux2(D.Flux2KleinPipeline, False),
    "BriaPipeline": bria,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "HiDreamImagePipeline": hidream,
    "SanaVideoPipeline": sana_video,
    "FluxControlNetPipeline": flux_controlnet,
    "StableDiffusion3ControlNetPipeline": sd3_controlnet,
    "QwenImageControlNetPipeline": qwen_controlnet,
    "FluxControlImg2ImgPipeline": control_from_image,
    "StableDiffusion3PAGPipeline": lambda: sd3(D.StableDiffusion3PAGPipeline),
    "StableDiffusion3PAGImg2ImgPipeline": lambda: from_image(D.StableDiffusion3PAGImg2ImgPipeline, build=sd3),
    "FluxControlNetImg2ImgPipeline": lambda: from_image(D.FluxControlNetImg2ImgPipeline, build=flux_controlnet),
    "PRXPixelPipeline": prx_pixel,
    "WanVideoToVideoPipeline": video_to_video,
    "Flux2KleinKVPipeline": lambda: flux2(D.Flux2KleinKVPipeline, False),
    "SanaPAGPipeline": lambda: sana(D.SanaPAGPipeline, pag_applied_layers="transformer_blocks.0"),
    "StableDiffusion3Pipeline": sd3,
    "StableDiffusion3Img2ImgPipeline": lambda: from_image(D.StableDiffusion3Img2ImgPipeline, build=sd3),
    "FluxPipeline": flux,
    "FluxPipeline with texts": flux_with_text,
    "FluxImg2ImgPipeline": lambda: from_image(D.FluxImg2ImgPipeline),
    "FluxKontextPipeline": kontext,
    "FluxControlPipeline": control,
    "FluxFillPipeline": fill,
    "ChromaPipeline": chroma,
    "ChromaImg2ImgPipeline": lambda: from_image(D.ChromaImg2ImgPipeline, build=chroma),
    "QwenImagePipeline": qwen,
    "QwenImageImg2ImgPipeline": lambda: from_image(D.QwenImageImg2ImgPipeline, build=qwen),
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
    for p in pipe.transformer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)  # gates that begin closed
    return pipe, call, rows
