"""Weights that wait elsewhere until they are needed. On a CPU, both places are its memory, or the disk."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch

from ..feature import Feature

CPU = torch.device("cpu")


def _by_group(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def _to_disk(pipe: Any) -> None:
    pipe.folder_of_weights = tempfile.TemporaryDirectory()  # lives as long as the pipeline
    _by_group(pipe, offload_type="leaf_level", offload_to_disk_path=pipe.folder_of_weights.name)


FEATURES = {
    "`enable_model_cpu_offload`": Feature(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "`enable_group_offload`, blocks": Feature(
        functools.partial(_by_group, offload_type="block_level", num_blocks_per_group=1)
    ),
    "`enable_group_offload`, layers": Feature(functools.partial(_by_group, offload_type="leaf_level")),
    "`enable_group_offload`, to disk": Feature(_to_disk),
}
