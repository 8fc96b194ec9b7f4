"""Pipelines of diffusers with random weights that only tests of training use, beside those of `tests/tiny_pipelines`.

Text encoders have real tokenizers, here of bytes. So `max_sequence_length` has to leave room for the instructions that
some pipelines put before prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers.utils import is_torchvision_available

from diffusers_attn.tiny_models.unet import SDXL
from diffusers_attn.tiny_models.weights import randomize

from .. import tiny_pipelines
from ..tiny_pipelines import _QWEN, _VAE, ATTENTION, CHAT, LATENTS, TEXT_DIM, _bytes, _random, _t5, pieces

TINY_FLUX = Path(__file__).resolve().parents[2] / "examples" / "tiny_flux"
_PADDING = {"padding": "<|endoftext|>", "padding_side": "right"}
PICTURE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_GEMMA = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def _clip(length: int = 77) -> tuple[Any, Any]:
    """Tokenizer and configuration of a CLIP text encoder, whose output is that of the token with the highest id."""
    tokenizer = _bytes(**_PADDING)
    tokenizer.model_max_length = length
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=length, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return tokenizer, config


def _t5_encoder() -> tuple[Any, Any]:
    tokenizer = pieces()
    return tokenizer, transformers.T5EncoderModel(transformers.T5Config(**_t5(len(tokenizer)))).eval()


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: a second self-attention in the first block."""
    tokenizer, config = _clip(16)
    tokenizer_3, encoder_3 = _t5_encoder()
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_3=tokenizer_3,
        text_encoder_3=encoder_3,
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=1.5).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_random(
            diffusers.SD3Transformer2DModel(
                **ATTENTION, sample_size=8, num_layers=2, joint_attention_dim=TEXT_DIM, caption_projection_dim=64,
                pooled_projection_dim=32, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
            )
        ),
    )  # fmt: skip


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL with a scheduler whose samples have the variance that the UNet gets."""
    tokenizer, config = _clip()
    unet = {name: each for name, each in SDXL.items() if name != "projection_class_embeddings_input_dim"}
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer_2=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        vae=diffusers.AutoencoderKL(**{**_VAE, "latent_channels": 4}, scaling_factor=0.4).eval(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        ),
        unet=_random(
            diffusers.UNet2DConditionModel(**unet, sample_size=8, projection_class_embeddings_input_dim=6 * 8 + 16)
        ),
        add_watermarker=False,
    )  # fmt: skip


def sdxl_v() -> diffusers.StableDiffusionXLPipeline:
    """The same, which predicts v."""
    pipeline = sdxl()
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    return pipeline


def chroma() -> diffusers.ChromaPipeline:
    tokenizer, encoder = _t5_encoder()
    return diffusers.ChromaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=0.4).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=_random(
            diffusers.ChromaTransformer2DModel(
                in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, num_attention_heads=4,
                attention_head_dim=16, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
            )
        ),
    )  # fmt: skip


def ltx() -> diffusers.LTXPipeline:
    tokenizer, encoder = _t5_encoder()
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENTS, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, scaling_factor=0.9,
    ).eval()  # fmt: skip
    vae.latents_mean.fill_(0.1)
    vae.latents_std.fill_(0.5)
    return diffusers.LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95),
        transformer=_random(
            diffusers.LTXVideoTransformer3DModel(
                **ATTENTION, cross_attention_dim=64, num_layers=2, caption_channels=TEXT_DIM
            )
        ),
    )


def ltx2() -> diffusers.LTX2Pipeline:
    """LTX-2.3, whose cross-attention has a timestep, too, with a vocoder that doubles the length."""
    tokenizer = _bytes(padding="<|endoftext|>", prefix=("<bos>",))
    video, audio, bins = 8, 4, 16
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": 2}
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=TEXT_DIM, text_proj_in_factor=3, per_modality_projections=True, video_hidden_dim=TEXT_DIM,
        audio_hidden_dim=TEXT_DIM,
        **{f"{kind}_connector_{name}": each for kind in ("video", "audio") for name, each in heads.items()},
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=video, block_out_channels=(8, 8, 8, 16), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=bins, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=audio, mel_bins=bins
    ).eval()
    for each, shift in ((vae, 0.1), (audio_vae, -0.2)):
        each.latents_mean.fill_(shift)
        each.latents_std.fill_(0.5)
    text = {
        **_GEMMA, "vocab_size": len(tokenizer), "sliding_window": 16, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return diffusers.LTX2Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ).eval(),
        connectors=_random(connectors),
        vae=vae,
        audio_vae=audio_vae,
        vocoder=diffusers.pipelines.ltx2.LTX2Vocoder(
            in_channels=2 * bins, hidden_channels=4, upsample_kernel_sizes=[16, 20], upsample_factors=[8, 10],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]], output_sampling_rate=8000,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95),
        transformer=_random(
            diffusers.LTX2VideoTransformer3DModel(
                in_channels=video, out_channels=video, num_attention_heads=4, attention_head_dim=16,
                cross_attention_dim=64, audio_in_channels=audio * bins // 4, audio_out_channels=audio * bins // 4,
                audio_num_attention_heads=4, audio_attention_head_dim=8, audio_cross_attention_dim=32,
                cross_attn_mod=True, audio_cross_attn_mod=True, num_layers=2, caption_channels=TEXT_DIM,
                use_prompt_embeddings=True, perturbed_attn=True,
            )
        ),
    )  # fmt: skip


def sana() -> diffusers.SanaPipeline:
    """Sana, with the timestep scale and the norms of Sana 1.5."""
    tokenizer = _bytes(**_PADDING)
    blocks = 6
    vae = diffusers.AutoencoderDC(
        latent_channels=LATENTS, encoder_block_out_channels=(16,) * blocks, decoder_block_out_channels=(16,) * blocks,
        encoder_layers_per_block=(1,) * blocks, decoder_layers_per_block=(1,) * blocks,
        encoder_qkv_multiscales=((),) * blocks, decoder_qkv_multiscales=((),) * blocks, scaling_factor=0.4,
    ).eval()  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(transformers.Gemma2Config(**_GEMMA, vocab_size=len(tokenizer))).eval(),
        vae=vae,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=_random(
            diffusers.SanaTransformer2DModel(
                **ATTENTION, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=16,
                cross_attention_dim=64, caption_channels=TEXT_DIM, sample_size=32, timestep_scale=0.5,
                qk_norm="rms_norm_across_heads",
            )
        ),
    )  # fmt: skip


def lumina2() -> diffusers.Lumina2Pipeline:
    tokenizer = _bytes(**_PADDING)
    return diffusers.Lumina2Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(transformers.Gemma2Config(**_GEMMA, vocab_size=len(tokenizer))).eval(),
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=0.4).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer=_random(
            diffusers.Lumina2Transformer2DModel(
                sample_size=8, in_channels=LATENTS, hidden_size=64, num_layers=2, num_refiner_layers=1,
                num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 32, 32), cap_feat_dim=TEXT_DIM,
            )
        ),
    )  # fmt: skip


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    tokenizer = _bytes(**_PADDING)
    tokenizer_2, config = _clip()
    llama = transformers.LlamaConfig(**_GEMMA, vocab_size=len(tokenizer), max_position_embeddings=1024)
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_2=transformers.CLIPTextModel(config).eval(),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=LATENTS, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
            mid_block_add_attention=False,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=_random(
            diffusers.HunyuanVideoTransformer3DModel(
                **ATTENTION, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM,
                pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
            )
        ),
    )  # fmt: skip


def hunyuan_video15() -> diffusers.HunyuanVideo15Pipeline:
    tokenizer = _bytes(**_PADDING, template=CHAT)
    tokenizer.model_max_length = 2048
    config = transformers.Qwen2_5_VLTextConfig(
        **_QWEN, vocab_size=len(tokenizer), num_hidden_layers=2,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    tokenizer_2 = transformers.ByT5Tokenizer()
    glyphs = transformers.T5Config(**{**_t5(len(tokenizer_2)), "d_model": 16})
    pipeline = diffusers.HunyuanVideo15Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen2_5_VLTextModel(config).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_2=transformers.T5EncoderModel(glyphs).eval(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=LATENTS // 2, block_out_channels=(16,) * 5, layers_per_block=1
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
        transformer=_random(
            diffusers.HunyuanVideo15Transformer3DModel(
                **{**ATTENTION, "in_channels": LATENTS + 1, "out_channels": LATENTS // 2},
                num_layers=2, num_refiner_layers=1,
                text_embed_dim=TEXT_DIM, text_embed_2_dim=16, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
                task_type="t2v",
            )
        ),
    )  # fmt: skip
    # A pipeline that is loaded has 1000 tokens of text, and 729 of the image that is not given.
    pipeline.system_message, pipeline.prompt_template_encode_start_idx = "", 8
    pipeline.tokenizer_max_length, pipeline.vision_num_semantic_tokens = 40, 7
    return pipeline


def krea2() -> diffusers.Krea2Pipeline:
    tokenizer = _bytes(**_PADDING)
    config = transformers.Qwen3VLConfig(
        text_config={
            **_QWEN, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "out_hidden_size": TEXT_DIM, "num_heads": 2, "intermediate_size": 16,
            "deepstack_visual_indexes": [],
        },
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen3VLModel(config).eval(),
        vae=tiny_pipelines.qwen_image().vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        text_encoder_select_layers=(1, 2),
        transformer=_random(
            diffusers.Krea2Transformer2DModel(
                in_channels=4 * LATENTS, num_layers=2, num_attention_heads=4, num_key_value_heads=2,
                attention_head_dim=16, intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=TEXT_DIM,
                num_text_layers=2, text_num_attention_heads=4, text_num_key_value_heads=2, text_intermediate_size=32,
                axes_dims_rope=(4, 6, 6),
            )
        ),
    )  # fmt: skip


def flux_kontext() -> diffusers.FluxKontextPipeline:
    """A guidance-distilled FLUX.1 Kontext."""
    tokenizer, config = _clip()
    tokenizer_2, encoder_2 = _t5_encoder()
    return diffusers.FluxKontextPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_2=encoder_2,
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=0.4).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=_random(
            diffusers.FluxTransformer2DModel(
                in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, num_attention_heads=4,
                attention_head_dim=16, joint_attention_dim=TEXT_DIM, pooled_projection_dim=16,
                axes_dims_rope=(4, 6, 6), guidance_embeds=True,
            )
        ),
    )  # fmt: skip


def flux_control() -> diffusers.FluxControlPipeline:
    """FLUX.1 with a control image, of which the VAE's distribution has no width: the pipeline draws from it."""
    base = flux_kontext()
    base.vae.quant_conv.weight.data[LATENTS:] = 0
    base.vae.quant_conv.bias.data[LATENTS:] = -60
    config = {**base.transformer.config, "in_channels": 8 * LATENTS, "out_channels": 4 * LATENTS}
    parts = {name: each for name, each in base.components.items() if name not in ("image_encoder", "feature_extractor")}
    transformer = _random(diffusers.FluxTransformer2DModel.from_config({**config, "_use_default_values": []}))
    return diffusers.FluxControlPipeline(**{**parts, "transformer": transformer})


class _ImageProcessor(transformers.Qwen2VLProcessor):
    """The processor without that of videos, which needs torchvision. A pipeline with it cannot be loaded."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        super().__init__(image_processor, tokenizer)


def _qwen_edit(cls: type[Any]) -> Any:
    """Qwen-Image-Edit, whose text encoder gets few tokens for an image, and a short instruction."""
    base = tiny_pipelines.qwen_image()
    tokenizer = _bytes(**_PADDING)
    tokenizer.add_special_tokens({"additional_special_tokens": list(PICTURE)})
    config = base.text_encoder.config
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    for name, token in zip(names, PICTURE, strict=True):
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = len(tokenizer)
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
    config.bos_token_id = config.eos_token_id = None
    videos = [transformers.Qwen2VLVideoProcessor()] if is_torchvision_available() else []
    processor = (transformers.Qwen2VLProcessor if videos else _ImageProcessor)(images, tokenizer, *videos)
    return cls(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        processor=processor,
        vae=base.vae,
        scheduler=base.scheduler,
        transformer=base.transformer,
    )


@contextlib.contextmanager
def small_references() -> Iterator[None]:
    """Within this context, Qwen-Image-Edit resizes reference images to 64 x 64 pixels and not to a million."""
    with contextlib.ExitStack() as stack:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            original = module.calculate_dimensions
            smaller = lambda area, ratio, original=original: original(area / 256, ratio)  # noqa: E731
            stack.enter_context(mock.patch.object(module, "calculate_dimensions", smaller))
        yield


def qwen_image_edit() -> diffusers.QwenImageEditPipeline:
    return _qwen_edit(diffusers.QwenImageEditPipeline)


def qwen_image_edit_plus() -> diffusers.QwenImageEditPlusPipeline:
    return _qwen_edit(diffusers.QwenImageEditPlusPipeline)


def wan_i2v() -> diffusers.WanImageToVideoPipeline:
    """Wan 2.1 from an image, whose embedding is an input as well."""
    base = tiny_pipelines.wan()
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    image = {"in_channels": 2 * LATENTS + 4, "image_dim": 16, "added_kv_proj_dim": 64}
    transformer = {**base.transformer.config, **image, "_use_default_values": []}
    return diffusers.WanImageToVideoPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        scheduler=base.scheduler,
        image_encoder=transformers.CLIPVisionModel(config).eval(),
        image_processor=transformers.CLIPImageProcessor(**sizes),
        transformer=_random(diffusers.WanTransformer3DModel.from_config(transformer)),
    )


def wan_ti2v() -> diffusers.WanImageToVideoPipeline:
    """Wan2.2-TI2V-5B from an image: the transformer gets a timestep for each token."""
    base = tiny_pipelines.wan()
    parts = {name: each for name, each in base.components.items() if name != "transformer_2"}
    return diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)


def wan_a14b() -> diffusers.WanPipeline:
    """Wan2.2-T2V-A14B: a transformer for high and one for low noise levels."""
    base = tiny_pipelines.wan()
    other = diffusers.WanTransformer3DModel.from_config(base.transformer.config)
    randomize(other, torch.Generator().manual_seed(1))
    return diffusers.WanPipeline(**{**base.components, "transformer_2": other.eval()}, boundary_ratio=0.875)


def wan_vace() -> diffusers.WanVACEPipeline:
    """Wan VACE, with a block for the control beside each block of the video."""
    base = tiny_pipelines.wan()
    names = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "text_dim", "freq_dim")
    names += ("ffn_dim", "num_layers", "rope_max_seq_len")
    shape = {name: base.transformer.config[name] for name in names}
    control = {"vace_layers": [0, 1], "vace_in_channels": 2 * LATENTS + 8 * 8}
    return diffusers.WanVACEPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        scheduler=base.scheduler,
        transformer=_random(diffusers.WanVACETransformer3DModel(**shape, **control)),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    **tiny_pipelines.PIPELINES,
    "sd3": sd3,
    "sdxl": sdxl,
    "sdxl_v": sdxl_v,
    "chroma": chroma,
    "ltx": ltx,
    "ltx2": ltx2,
    "sana": sana,
    "lumina2": lumina2,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "krea2": krea2,
    "flux_kontext": flux_kontext,
    "flux_control": flux_control,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": qwen_image_edit_plus,
    "wan_i2v": wan_i2v,
    "wan_ti2v": wan_ti2v,
    "wan_a14b": wan_a14b,
    "wan_vace": wan_vace,
}


def make(name: str) -> Any:
    """One of `PIPELINES` or "flux", without touching the global generator."""
    if name == "flux":
        return diffusers.FluxPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PIPELINES[name]()
