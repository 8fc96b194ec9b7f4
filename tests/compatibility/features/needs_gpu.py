"""Features whose devices or kernels a CPU does not have."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..feature import Feature, lossy
from .precision import each_linear, float32

_PIPELINE = Path(__file__).parents[3] / "examples" / "tiny_flux"
_ON_CPUS = ("provider", "blocks", "whole", "ulysses", "ring", "gather", "both", "blocks over ranks", "guidance",
            "weights", "vae")  # fmt: skip


def _by_group(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), **options
    )


def _whole(**options: Any) -> Any:
    pipe = diffusers.FluxPipeline.from_pretrained(_PIPELINE, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw_whole(pipe: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    call = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 4, "output_type": "pt"}
    return [pipe(["a cat"], generator=generator, **call).images.cpu()]


def _bitsandbytes(pipe: Any) -> None:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        found = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        found.weight = bnb.nn.Int8Params(layer.weight.data.half().cpu(), requires_grad=False, has_fp16_weights=False)
        found.bias = layer.bias
        return found.to("cuda")

    each_linear(pipe, make)


FEATURES = {
    "`enable_model_cpu_offload`, to a GPU": Feature(lambda pipe: pipe.enable_model_cpu_offload(), not_under=_ON_CPUS),
    "`enable_sequential_cpu_offload`": Feature(lambda pipe: pipe.enable_sequential_cpu_offload(), not_under=_ON_CPUS),
    "`enable_group_offload`, blocks to a GPU": Feature(
        functools.partial(_by_group, offload_type="block_level", num_blocks_per_group=1), not_under=_ON_CPUS
    ),
    "`enable_group_offload`, a stream": Feature(
        functools.partial(_by_group, offload_type="leaf_level", use_stream=True), not_under=_ON_CPUS
    ),
    '`device_map="balanced"`': Feature(
        lambda pipe: _whole(device_map="balanced"),
        build=_whole,
        draw=_draw_whole,
        tolerance=1e-5,
        orders=("before",),
        not_under=_ON_CPUS,
    ),
    "bitsandbytes, int8": lossy(
        _bitsandbytes,
        build=float32,
        tolerance=1e-3,
        package="bitsandbytes",
        orders=("before",),
        not_under=_ON_CPUS,
    ),
}
