"""Divides a call's batch among groups of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..nested import like, updated
from .groups import Groups


def samples_of(value: Any) -> int:
    """Number of samples in a model's first argument: a tensor `[batch, ...]`, or a list with an item for each."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else 1
    return len(value) if isinstance(value, list) else 1


def part_of(value: Any, samples: int, start: int, count: int) -> Any:
    """The samples from `start` on. Tensors `[samples, ...]` and lists with an item for each sample are cut, also
    within tuples and dicts; everything else is the same for all samples.

    Args:
        value: an argument of a model.
        samples: number of samples in the call.
        start, count: the samples to take.
    """
    if isinstance(value, Tensor):
        return value[start : start + count] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, list):
        if len(value) == samples and not all(_is_batch(each, samples) for each in value):
            return value[start : start + count]
        return [part_of(each, samples, start, count) for each in value]
    if isinstance(value, tuple):
        return like(value, [part_of(each, samples, start, count) for each in value])
    if isinstance(value, Mapping):
        return updated(value, {key: part_of(each, samples, start, count) for key, each in value.items()})
    return value


def _is_batch(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == samples


def joined(output: Any, samples: int, groups: Groups) -> Any:
    """The output for all samples, from every group's part. All ranks must call this.

    Args:
        output: this group's output: tensors `[samples / groups, ...]`, or lists with an item for each of its samples.
        samples: number of samples of all groups.
        groups: the groups, each with the same number of samples.
    """
    count = samples // groups.count
    sizes = [count] * groups.count
    if isinstance(output, Tensor):
        return groups.gather(output.contiguous(), sizes) if output.ndim else output
    if isinstance(output, list) and len(output) == count and all(isinstance(each, Tensor) for each in output):
        if all(each.shape == output[0].shape for each in output):
            return list(groups.gather(torch.stack(output), sizes).unbind(0))
    if isinstance(output, (list, tuple)):
        return like(output, [joined(each, samples, groups) for each in output])
    if isinstance(output, Mapping):
        return updated(output, {key: joined(each, samples, groups) for key, each in output.items()})
    return output
