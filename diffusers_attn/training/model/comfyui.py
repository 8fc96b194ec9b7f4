"""A LoRA with the names of weights that ComfyUI's own loader knows, and with the `.alpha` of each layer.

ComfyUI looks up layers by the names of its own models after "diffusion_model.", and for some models by diffusers' names
after "transformer." (its `comfy/lora.py`, `model_lora_keys_unet`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.disk import write_file
from ..errors import TrainingError
from ..settings.flag_names import option

FILE = "comfyui_lora.safetensors"


class Names(NamedTuple):
    """How ComfyUI names the layers of a transformer."""

    prefix: str
    """Text before diffusers' name of each layer."""
    changes: Sequence[tuple[str, str]] = ()
    """Regular expressions, and what replaces the parts of the names with prefix that they match."""


_WAN = Names(
    "diffusion_model.",
    (
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.add_(k|v)_proj$", r".\1_img"),
        (r"\.to_(q|k|v)$", r".\1"),
        (r"\.to_out\.0$", ".o"),
        (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
        (r"\.ffn\.net\.2$", ".ffn.2"),
    ),
)
# ComfyUI maps diffusers' names of double blocks alone.
_FLUX2 = Names(
    "transformer.",
    (
        (r"^transformer\.single_transformer_blocks\.(\d+)", r"diffusion_model.single_blocks.\1"),
        (r"(single_blocks\.\d+)\.attn\.to_qkv_mlp_proj$", r"\1.linear1"),
        (r"(single_blocks\.\d+)\.attn\.to_out$", r"\1.linear2"),
    ),
)
_SAME, _MAPPED = Names("diffusion_model."), Names("transformer.")
NAMES = {
    "FluxTransformer2DModel": _MAPPED,
    "Flux2Transformer2DModel": _FLUX2,
    "ChromaTransformer2DModel": _MAPPED,
    "SD3Transformer2DModel": _MAPPED,
    "QwenImageTransformer2DModel": _SAME,
    "ZImageTransformer2DModel": _SAME,
    "Krea2Transformer2DModel": _SAME,
    "LTXVideoTransformer3DModel": _SAME,
    "WanTransformer3DModel": _WAN,
}
"""The names by class of the transformer. Others need their layers joined, or are not known to ComfyUI."""


def check_comfyui(transformer: str, adapter: str) -> None:
    """Raises TrainingError if adapters of this kind, or for this class of transformer, have no names in ComfyUI."""
    if adapter not in ("lora", "rslora"):
        raise TrainingError(
            f"{option('format', 'comfyui')} is written for --adapter lora and rslora, not for "
            f"{option('adapter', adapter)}. Leave one of them out."
        )
    if transformer not in NAMES:
        raise TrainingError(
            f"{option('format', 'comfyui')}: ComfyUI's names of the layers of {transformer} are not known here, only "
            f"those of {', '.join(NAMES)}. Leave it out; the adapter in diffusers' format can be converted later."
        )


def comfyui_layers(layers: Mapping[str, Tensor], transformer: str, scaling: float) -> dict[str, Tensor]:
    """The weights of an adapter by the names of ComfyUI.

    Args:
        layers: weights by PEFT's names: `NAME.lora_A.weight` [rank, in] and `NAME.lora_B.weight` [out, rank].
        transformer: class name of the transformer.
        scaling: factor of the product of the two.

    Returns:
        The weights, and `NAME.alpha` for each layer: the rank times the scaling.
    """
    names = NAMES[transformer]
    found = {}
    for key, weight in layers.items():
        name, which = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", key).groups()  # type: ignore[union-attr]
        name = names.prefix + name
        for pattern, replacement in names.changes:
            name = re.sub(pattern, replacement, name)
        found[f"{name}.{which}"] = weight.contiguous()
        if which.startswith("lora_A"):
            found[f"{name}.alpha"] = torch.tensor(scaling * weight.shape[0])
    return found


def save_comfyui(layers: Mapping[str, Tensor], transformer: str, scaling: float, folder: Path) -> Path:
    """Writes an adapter for ComfyUI atomically. Arguments are those of `comfyui_layers`.

    Returns:
        The file in `folder`.
    """
    from safetensors.torch import save_file

    found = comfyui_layers(layers, transformer, scaling)
    write_file(folder / FILE, lambda path: save_file(found, path, {"format": "pt"}), "the adapter for ComfyUI")
    return folder / FILE
