"""Weights of fewer bits. Layers of the packages take the place of the transformer's, as `quantization_config` of
`from_pretrained` puts them; the loader itself asks for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..feature import Feature, lossy, wan


def float32() -> Any:
    return wan().to(torch.float32)


def each_linear(pipe: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replaces the layers within the blocks."""
    for block in pipe.transformer.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, make(layer).requires_grad_(False))


def _bfloat16(pipe: Any) -> None:
    pipe.transformer.to(torch.bfloat16)


def _layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64)


def _torchao(config: str) -> Callable[[Any], None]:
    def put(pipe: Any) -> None:
        import torchao.quantization as ao

        ao.quantize_(pipe.transformer.blocks, getattr(ao, config)())

    return put


def _bitsandbytes(pipe: Any) -> None:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        found = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
        found.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        found.bias = layer.bias
        return found.to("cpu")

    each_linear(pipe, make)


def _quanto(pipe: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(pipe.transformer.blocks, weights=qint8)
    freeze(pipe.transformer.blocks)


def _gguf(pipe: Any) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        found = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        found.weight, found.bias = GGUFParameter(data, quant_type=kind), layer.bias
        return found

    each_linear(pipe, make)


def _quantised(put: Callable[[Any], None], package: str) -> Feature:
    """Models are quantised when they are loaded: before anything else."""
    return lossy(put, build=float32, tolerance=1e-4, package=package, orders=("before",))


FEATURES = {
    # What it rounds is less than what another order of its sums does.
    "bfloat16": Feature(_bfloat16, tolerance=0.05, orders=("before",)),
    "`enable_layerwise_casting`, float8": lossy(_layerwise),
    "torchao, int8 weights": _quantised(_torchao("Int8WeightOnlyConfig"), "torchao"),
    "torchao, float8 weights": _quantised(_torchao("Float8WeightOnlyConfig"), "torchao"),
    "bitsandbytes, NF4": _quantised(_bitsandbytes, "bitsandbytes"),
    "GGUF, Q8_0": _quantised(_gguf, "gguf"),
    "quanto, int8 weights": _quantised(_quanto, "optimum.quanto"),
}
NOT_RUN = {"SVDQuant (nunchaku)": "its kernels need a GPU, and a package that PyPI does not have"}
