"""Adapters in other formats, and adapters that training goes on from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import FAMILIES, family_of
from diffusers_attn.training.model.comfyui import FILE, NAMES, check_comfyui, comfyui_layers
from diffusers_attn.training.model.init_adapter import read_adapter, start_from
from diffusers_attn.training.model.lora import adapter_config, adapter_weights, add_adapter, save_adapter

from .test_lora import pipeline_of, trained


def products(pipeline):
    """The change that the adapter makes to each layer's weight."""
    layers = {name: each for name, each in pipeline.transformer.named_modules() if hasattr(each, "lora_A")}
    return {name: each.get_delta_weight("default") for name, each in layers.items()}


def untrained(name, kind, rank=4, alpha=8.0, targets=None):
    pipeline = pipeline_of(name)
    targets = targets or family_of(pipeline).lora_targets
    add_adapter(pipeline.transformer, adapter_config(kind, rank, alpha, targets), seed=0)
    return pipeline


def saved(pipeline, folder, kind="lora", comfyui=False):
    weights = adapter_weights(pipeline.transformer)
    save_adapter(pipeline, weights, folder, kind, pipeline.transformer, comfyui=comfyui)
    return folder


@pytest.mark.parametrize(("name", "kind"), [("flux", "lora"), ("wan", "rslora"), ("cogview4", "dora")])
def test_training_goes_on_from_a_saved_adapter(name, kind, tmp_path):
    """Also where the scale of the adapter, alpha / rank, is another one."""
    pipeline = trained(name, kind)
    other = untrained(name, kind, alpha=2.0)
    start_from(read_adapter(other, saved(pipeline, tmp_path, kind)), other.transformer)
    expected, found = products(pipeline), products(other)
    assert expected.keys() == found.keys() and len(expected) > 1
    for layer, each in expected.items():
        torch.testing.assert_close(found[layer], each, atol=1e-5, rtol=1e-5)
    before, now = adapter_weights(pipeline.transformer), adapter_weights(other.transformer)
    assert all(now[each].equal(before[each]) for each in now if ".lora_B." not in each)


@pytest.mark.parametrize("name", ["flux", "wan", "qwen_image", "z_image"])
def test_a_file_for_comfyui_is_the_same_adapter(name, tmp_path):
    """diffusers reads ComfyUI's names and alphas of these models."""
    pipeline = trained(name, "lora")
    saved(pipeline, tmp_path, comfyui=True)
    other = untrained(name, "lora", alpha=1.0)
    start_from(read_adapter(other, tmp_path / FILE), other.transformer)
    for (layer, expected), found in zip(products(pipeline).items(), products(other).values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=layer)


def test_names_in_comfyui(tmp_path):
    saved(trained("wan", "lora", targets=["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]), tmp_path, comfyui=True)
    found = load_file(tmp_path / FILE)
    block = "diffusion_model.blocks.0"
    names = [f"{block}.{each}" for each in ("self_attn.q", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2")]
    for name in names:
        assert {f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"} <= found.keys()
        assert found[f"{name}.alpha"].item() == 8.0 and found[f"{name}.lora_A.weight"].shape[0] == 4
    assert all(each.startswith("diffusion_model.blocks.") for each in found)

    layers = {f"{name}.lora_A.weight": torch.zeros(4, 1) for name in (
        "single_transformer_blocks.3.attn.to_qkv_mlp_proj", "single_transformer_blocks.3.attn.to_out",
        "transformer_blocks.1.attn.to_out.0",
    )}  # fmt: skip
    assert [each.removesuffix(".alpha") for each in comfyui_layers(layers, "Flux2Transformer2DModel", 0.5)][1::2] == [
        "diffusion_model.single_blocks.3.linear1", "diffusion_model.single_blocks.3.linear2",
        "transformer.transformer_blocks.1.attn.to_out.0",
    ]  # fmt: skip
    assert NAMES.keys() <= FAMILIES.keys()


def test_models_without_names_in_comfyui():
    with pytest.raises(TrainingError, match="--format comfyui: .*CogView4Transformer2DModel are not known.*Flux"):
        check_comfyui("CogView4Transformer2DModel", "lora")
    with pytest.raises(TrainingError, match="--adapter lora and rslora, not for --adapter dora"):
        check_comfyui("FluxTransformer2DModel", "dora")


def test_files_that_training_cannot_go_on_from(tmp_path):
    folder = saved(trained("cogview4", "lora"), tmp_path / "lora")
    with pytest.raises(TrainingError, match=r"shape \[4, .* is trained. Give the adapter's rank, such as --rank 4"):
        other = untrained("cogview4", "lora", rank=8)
        start_from(read_adapter(other, folder), other.transformer)
    with pytest.raises(TrainingError, match="adapter of other layers: .* which only the file has"):
        other = untrained("cogview4", "lora", targets=["to_q"])
        start_from(read_adapter(other, folder), other.transformer)
    with pytest.raises(TrainingError, match="there is no file"):
        read_adapter(other, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot be read as a LoRA of CogView4Pipeline"):
        read_adapter(other, tmp_path / "a.safetensors")
