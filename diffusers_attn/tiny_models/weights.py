"""Random weights under which no part of a model is switched off."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Overwrite every parameter with random values of unit gain.

    Freshly built diffusion models are often blind: output layers, adaptive-norm projections or gates start at zero,
    and the output then does not depend on some or all of the attention. Unit gain keeps activations of order one
    through any number of layers and attention logits of order one as well, so that softmax is neither uniform nor
    saturated.
    """
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if name in ("weight", "gamma") and (is_norm or parameter.ndim == 1):
                values = 1 + 0.1 * noise
            elif name == "bias":
                values = 0.1 * noise
            elif name == "weight" and not isinstance(module, nn.Embedding):
                values = noise / math.sqrt(parameter[0].numel())
            else:  # embeddings, modulation tables, gates, learned tokens
                values = 0.5 * noise
            parameter.copy_(values)


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast to `dtype` as from_pretrained(torch_dtype=...) would, which `to` does not.

    Parts that the class lists to stay in float32 stay; buffers that are not saved (rotary frequencies) are not touched.
    """
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and keep.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model
