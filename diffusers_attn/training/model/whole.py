"""Training of a transformer's own weights, without an adapter, and saving it as a folder in diffusers' format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.disk import writing


def train_whole(transformer: nn.Module) -> list[nn.Parameter]:
    """Makes all weights of a transformer trainable, in float32. Returns them."""
    transformer.requires_grad_(True)
    parameters = list(transformer.parameters())
    for each in parameters:
        each.data = each.data.float()
    return parameters


def class_of(transformer: nn.Module) -> type[Any]:
    """The class of a transformer in diffusers, also where FSDP2 has given it a subclass."""
    return next(each for each in type(transformer).__mro__ if each.__module__.startswith("diffusers."))


def save_whole(transformer: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Saves a transformer for `from_pretrained` of its class. A folder that exists is replaced when the new one is
    complete.

    Args:
        transformer: the model, with its configuration and buffers. FSDP2 may have sharded it.
        weights: all its weights by name, from `adapter_weights`.
        folder: the folder, such as `output_dir/transformer`.

    Returns:
        The folder.
    """
    trained: Any = transformer
    with torch.device("meta"):
        bare = class_of(transformer).from_config(trained.config)
    buffers = dict(transformer.named_buffers())
    state = {name: weights[name] if name in weights else buffers[name] for name in bare.state_dict()}
    bare.load_state_dict(state, assign=True)
    scratch = folder.with_name(f".unfinished-{folder.name}")
    with writing("the transformer", folder, sum(each.numel() * each.element_size() for each in weights.values())):
        shutil.rmtree(scratch, ignore_errors=True)
        bare.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
    return folder
