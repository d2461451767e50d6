"""Pipelines of diffusers with random weights, small enough for a test, built from configs without a network."""

import warnings

import torch
import transformers as T
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers as D

TOKENS = 8


def clip_tokenizer():
    """One token per byte, with CLIP's marks."""
    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return T.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=TOKENS)


def bytes_tokenizer():
    """One token per byte, for encoders of any kind."""
    letters = sorted(ByteLevel.alphabet())
    plain = Tokenizer(BPE({name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *letters])}, [], unk_token="<unk>"))
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    plain.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return T.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def t5(width=16):
    return T.T5EncoderModel(T.T5Config(d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=259))


def clip_config(width=16):
    return T.CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=514,
        max_position_embeddings=TOKENS, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip


def vae(channels=4):
    return D.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def unet(**changes):
    settings = dict(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    return D.UNet2DConditionModel(**settings | changes)


def stable_diffusion(prediction="epsilon"):
    """Version 1.5: a PNDM scheduler, as it comes."""
    scheduler = D.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip
    return D.StableDiffusionPipeline(
        vae=vae(), text_encoder=T.CLIPTextModel(clip_config()), tokenizer=clip_tokenizer(), unet=unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl():
    scheduler = D.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32, transformer_layers_per_block=(1, 1), use_linear_projection=True,
    )  # fmt: skip
    return D.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=T.CLIPTextModel(clip_config()), text_encoder_2=T.CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=network, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3():
    """Without T5, as the pipeline allows."""
    network = D.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    return D.StableDiffusion3Pipeline(
        transformer=network, scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=T.CLIPTextModelWithProjection(clip_config()), tokenizer=clip_tokenizer(),
        text_encoder_2=T.CLIPTextModelWithProjection(clip_config()), tokenizer_2=clip_tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(**changes):
    """Prompts are given as embeddings, unless there are encoders among the ``changes``."""
    network = D.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    scheduler = D.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    none = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = D.FluxPipeline(scheduler=scheduler, vae=vae(), transformer=network, **none | changes)
    pipe.default_sample_size = 8
    return pipe


def flux_with_encoders():
    clip = {"text_encoder": T.CLIPTextModel(clip_config()), "tokenizer": clip_tokenizer()}
    return flux(**clip, text_encoder_2=t5(), tokenizer_2=bytes_tokenizer())


def stable_audio():
    """The T5 encoder without a tokenizer: prompts are given as embeddings."""
    network = D.StableAudioDiTModel(
        sample_size=4, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        num_key_value_attention_heads=1, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=32,
        cross_attention_input_dim=16,
    )  # fmt: skip
    oobleck = D.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=4,
        decoder_input_channels=4, audio_channels=2, sampling_rate=8,
    )  # fmt: skip
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    encoder = T.T5EncoderModel(T.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    return D.StableAudioPipeline(
        vae=oobleck, text_encoder=encoder, projection_model=projection, tokenizer=None, transformer=network,
        scheduler=D.CosineDPMSolverMultistepScheduler(solver_order=1),
    )  # fmt: skip


def audioldm2():
    """Prompts are given as embeddings: its three tokenizers cannot be built without a network."""
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel

    network = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, 32),) * 2, attention_head_dim=4,
    )  # fmt: skip
    mel = D.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=1, out_channels=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vocoder = T.SpeechT5HifiGan(T.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16, upsample_initial_channel=8, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 3], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
    ))  # fmt: skip
    language = T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32, n_positions=16))
    encoder = T.T5EncoderModel(T.T5Config(d_model=32, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    scheduler = D.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return D.AudioLDM2Pipeline(
        vae=mel, text_encoder=None, text_encoder_2=encoder, projection_model=AudioLDM2ProjectionModel(16, 32, 16),
        language_model=language, tokenizer=None, tokenizer_2=None, feature_extractor=None, unet=network, scheduler=scheduler,
        vocoder=vocoder,
    )  # fmt: skip


BUILDERS = {
    f.__name__: f
    for f in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, stable_audio, audioldm2)
}


def build(name, seed=0):
    """A pipeline with weights of its own, and nothing trainable in it; ``name`` is one of the builders, or a function."""
    torch.manual_seed(seed)
    pipe = BUILDERS[name]() if isinstance(name, str) else name()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe
