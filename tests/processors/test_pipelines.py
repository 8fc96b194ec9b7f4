"""`set_attention_provider` on models in any wrapping, and on pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionControlNetPipeline,
    WanPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig, get_peft_model

from diffusers_attn import AttentionProviderError, set_attention_provider
from diffusers_attn.processors import attention_modules

from ..zoo import CASES

TINY_FLUX = Path(__file__).parents[2] / "examples" / "tiny_flux"


def providers(model):
    return {module.provider for module in attention_modules(model)}


def autoencoder():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


def controlnet_pipeline(controlnet):
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionControlNetPipeline(
        vae=autoencoder(), unet=CASES["sd15"].build(), controlnet=controlnet, scheduler=DDIMScheduler(),
        requires_safety_checker=False, **rest,
    )  # fmt: skip


@torch.no_grad()
def test_a_whole_pipeline_draws_the_same(routed):
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a cat", height=64, width=64, num_inference_steps=2, max_sequence_length=32, generator=generator,
            output_type="pt",
        ).images  # fmt: skip

    expected = draw()
    set_attention_provider(pipeline, "_native_math")
    assert torch.allclose(draw(), expected, atol=1e-4)
    assert len(routed) == 2 * len(attention_modules(pipeline.transformer))
    set_attention_provider(pipeline, None)
    assert torch.equal(draw(), expected)


def test_all_denoising_models_and_no_others():
    one, two = CASES["sd_controlnet"].build(), CASES["sd_controlnet"].build()
    pipeline = controlnet_pipeline(MultiControlNetModel([one, two]))
    set_attention_provider(pipeline, "native")
    assert providers(pipeline.unet) == providers(one) == providers(two) == {"native"}
    assert providers(pipeline.vae) == {None}
    set_attention_provider(pipeline.vae, "native")
    assert providers(pipeline.vae) == {"native"}
    set_attention_provider(pipeline, None)
    assert providers(pipeline.unet) == providers(one) == {None}


def test_both_transformers_of_wan():
    models = [CASES["wan"].build(), CASES["wan"].build()]
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=models[0], transformer_2=models[1], boundary_ratio=0.9,
    )  # fmt: skip
    set_attention_provider(pipeline, "native")
    assert [providers(model) for model in models] == [{"native"}] * 2


def test_nothing_changes_where_one_model_cannot_follow():
    controlnet = CASES["sd_controlnet"].build()
    controlnet.set_attention_slice("max")
    pipeline = controlnet_pipeline(controlnet)
    with pytest.raises(AttentionProviderError, match="ControlNetModel .*SlicedAttnProcessor"):
        set_attention_provider(pipeline, "native")
    assert providers(pipeline.unet) == {None}


def test_a_model_within_a_peft_model(routed):
    model = CASES["flux"].build()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))
    set_attention_provider(wrapped, "_native_math")
    assert providers(model) == {"_native_math"}
    with torch.no_grad():
        wrapped(**CASES["flux"].inputs())
    assert set(routed) == {"_native_math"}


@pytest.mark.parametrize("target", [None, "flux", DDPMScheduler()], ids=repr)
def test_what_is_neither_model_nor_pipeline(target):
    with pytest.raises(AttentionProviderError, match=f"{type(target).__name__}; a model .* or a diffusers pipeline"):
        set_attention_provider(target, "native")


def test_a_pipeline_without_a_denoising_model():
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=None,
    )  # fmt: skip
    with pytest.raises(AttentionProviderError, match="FluxPipeline has no transformer.*components are vae"):
        set_attention_provider(pipeline, "native")
