"""The parts of `tiny_flux`, before the transformer is trained.

* The tokenizers are hand-written tables (a trained one differs from process to process).
* The text encoders are random and frozen, which suffices to distinguish captions.
* The VAE is the identity, by construction of its weights, so a latent *is* the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

SIZE = 64  # pixels a side; FLUX packs 2 x 2 latents into a token, so a picture is 32 x 32 = 1024 tokens
TEXT_DIM = 32


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE without a single merge: every byte is a token, so any prompt can be read."""
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """Unigram over the captions' words; what it does not know is spelled in ASCII characters."""
    words = sorted({word for caption in captions for word in caption.split()})
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}  # ids 0, 1 and 2, as T5 has them
    scores |= {"▁" + word: -4.0 for word in words}
    scores |= {"▁": -8.0} | {chr(code): -10.0 for code in range(33, 127)}
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=0, model_max_length=512)


def text_encoders(clip_vocab: CLIPTokenizer, t5_vocab: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Random, frozen encoders. CLIP's usual tiny initialisation would give every prompt the same pooled vector."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            projection_dim=TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_factor=10.0,
            bos_token_id=clip_vocab.bos_token_id,
            eos_token_id=clip_vocab.eos_token_id,
            pad_token_id=clip_vocab.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_vocab),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)


@torch.no_grad()
def identity_vae() -> AutoencoderKL:
    """An AutoencoderKL that returns its input, to float precision, though every layer of it runs.

    Encoder and decoder alike are conv_in, residual blocks, GroupNorm, SiLU, conv_out. With zero weights a residual
    block adds nothing. conv_in lays the pixel out as `[x, -x, K, -K]`: the mean of that is exactly zero and, for a
    large K, its deviation is K/2 whatever x is, so the norm with weight K/2 changes nothing either. And
    `silu(x) - silu(-x) = x`, which is what conv_out computes. No step needs more precision than the pixel itself has,
    so the VAE also works in bfloat16.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for name, parameter in vae.named_parameters():
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    large = 1024.0
    for half in (vae.encoder, vae.decoder):
        for channel in range(3):
            half.conv_in.weight[channel, channel, 1, 1] = 1.0
            half.conv_in.weight[channel + 3, channel, 1, 1] = -1.0
            half.conv_out.weight[channel, channel, 1, 1] = 1.0
            half.conv_out.weight[channel, channel + 3, 1, 1] = -1.0
        half.conv_in.bias[6:] = torch.tensor([large, -large])
        half.conv_norm_out.weight.fill_(large / 2)
    vae.encoder.conv_out.bias[3:] = -30.0  # the log-variance: the posterior has no width
    return vae.eval().requires_grad_(False)


def build_pipeline(captions: Sequence[str], seed: int) -> FluxPipeline:
    """The pipeline with an untrained transformer. The same seed gives the same weights.

    Args:
        captions: their words are tokens of the T5 tokenizer.
        seed: seed of the text encoders and the transformer.
    """
    torch.manual_seed(seed)
    clip_vocab, t5_vocab = clip_tokenizer(), t5_tokenizer(captions)
    clip, t5 = text_encoders(clip_vocab, t5_vocab)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=24,
        axes_dims_rope=(4, 10, 10),
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=identity_vae(),
        text_encoder=clip,
        tokenizer=clip_vocab,
        text_encoder_2=t5,
        tokenizer_2=t5_vocab,
        transformer=transformer,
    )
