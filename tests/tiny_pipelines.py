"""Genuine pipelines of diffusers at a size that draws in a moment, with random weights and tokenizers made by hand.

Nothing is trained or downloaded: what is made is the same in every process. Save one with `save_pretrained`, and it
loads as any model from the Hub does. (Flux is not among them: `examples/tiny_flux` is a better one.)
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from diffusers_attn.tiny_models.weights import randomize

TEXT_DIM = 32
LATENTS = 16
ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": LATENTS, "out_channels": LATENTS}

CHAT = "{% for each in messages %}{{ each.role }}:{{ each.content }}\n{% endfor %}a:"
_QWEN = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_window_layers": 0,
}
_VAE = {
    "latent_channels": LATENTS,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 64,
}


def wan() -> diffusers.WanPipeline:
    tokenizer = pieces()
    config = transformers.UMT5Config(**_t5(len(tokenizer)))
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=LATENTS, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=_random(
            diffusers.WanTransformer3DModel(
                **ATTENTION, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64
            )
        ),
    )


def cogvideox() -> diffusers.CogVideoXPipeline:
    tokenizer = pieces()
    blocks = 4
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**_t5(len(tokenizer)))).eval(),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * blocks,
            up_block_types=("CogVideoXUpBlock3D",) * blocks,
            block_out_channels=(8,) * blocks,
            latent_channels=LATENTS,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=64,
            sample_width=64,
        ).eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        transformer=_random(
            diffusers.CogVideoXTransformer3DModel(
                **ATTENTION,
                time_embed_dim=16,
                text_embed_dim=TEXT_DIM,
                num_layers=2,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                max_text_seq_length=21,
                use_rotary_positional_embeddings=True,
            )
        ),
    )


def cogview4() -> diffusers.CogView4Pipeline:
    tokenizer = _bytes(padding="<|endoftext|>", prefix=("[gMASK]", "<sop>"))
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels = (8, 16, 16, 16)
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GlmModel(config).eval(),
        vae=diffusers.AutoencoderKL(
            latent_channels=LATENTS,
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=64,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        transformer=_random(
            diffusers.CogView4Transformer2DModel(
                **ATTENTION, num_layers=2, text_embed_dim=TEXT_DIM, time_embed_dim=32, condition_dim=16, sample_size=8
            )
        ),
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    tokenizer = _bytes(padding="<|endoftext|>", padding_side="right")
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_QWEN, "vocab_size": len(tokenizer), "num_hidden_layers": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "out_hidden_size": TEXT_DIM, "num_heads": 2, "intermediate_size": 16,
        },
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=LATENTS, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9),
        transformer=_random(
            diffusers.QwenImageTransformer2DModel(
                in_channels=4 * LATENTS, out_channels=LATENTS, num_layers=2, num_attention_heads=4,
                attention_head_dim=16, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
            )
        ),
    )  # fmt: skip


def z_image() -> diffusers.ZImagePipeline:
    tokenizer = _bytes(padding="<|endoftext|>", padding_side="right", template=CHAT)
    config = transformers.Qwen3Config(**_QWEN, vocab_size=len(tokenizer), num_hidden_layers=2, head_dim=8)
    return diffusers.ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen3Model(config).eval(),
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_random(
            diffusers.ZImageTransformer2DModel(
                in_channels=LATENTS, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
                cap_feat_dim=TEXT_DIM, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
            )
        ),
    )  # fmt: skip


def flux2() -> diffusers.Flux2KleinPipeline:
    """FLUX.2 klein: its text inputs are those of three layers of the text encoder, the last of them the 27th."""
    tokenizer = _bytes(padding="<|endoftext|>", padding_side="right", template=CHAT)
    config = transformers.Qwen3Config(
        **{**_QWEN, "hidden_size": 16, "intermediate_size": 16},
        vocab_size=len(tokenizer),
        num_hidden_layers=27,
        head_dim=8,
    )
    vae = diffusers.AutoencoderKLFlux2(
        **{name: each for name, each in _VAE.items() if name != "mid_block_add_attention"}, patch_size=(2, 2)
    ).eval()
    vae.bn.running_mean.fill_(0.1)
    vae.bn.running_var.fill_(0.5)
    return diffusers.Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen3ForCausalLM(config).eval(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=_random(
            diffusers.Flux2Transformer2DModel(
                in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, num_attention_heads=4,
                attention_head_dim=16, joint_attention_dim=48, timestep_guidance_channels=32,
                axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
            )
        ),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "cogvideox": cogvideox,
    "cogview4": cogview4,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "flux2": flux2,
}


def make(name: str) -> Any:
    """One of `PIPELINES`, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PIPELINES[name]()


def _random(transformer: Any) -> Any:
    randomize(transformer, torch.Generator().manual_seed(0))
    return transformer.eval()


def _t5(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }


def pieces() -> transformers.T5Tokenizer:
    """A sentence-piece table of single characters. (Trainers of tokenizers give another table in every process.)"""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    characters = [(each, -4.0) for each in string.ascii_letters + string.digits + string.punctuation]
    return transformers.T5Tokenizer(vocab=special + characters, extra_ids=0, model_max_length=512)


def _bytes(
    padding: str, prefix: tuple[str, ...] = (), padding_side: str = "left", template: str | None = None
) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, with `prefix` before every text. By default padded on the left, as GLM's tokenizer is.
    `template` is that of chats."""
    tokens = [padding, *prefix, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([padding, *prefix])
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"], special_tokens=[(token, tokenizer.token_to_id(token)) for token in prefix]
        )
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, padding_side=padding_side, model_max_length=1024
    )
    found.chat_template = template
    return found
