"""Divides a call's batch among groups of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nested import like, updated
from .groups import Groups


class Batch(NamedTuple):
    """The samples of a call."""

    samples: int
    """Number of samples."""
    listed: bool = False
    """Whether the model takes its samples as a list with an item for each."""

    @staticmethod
    def of(latents: Any) -> Batch:
        """The batch of a call with these latents, a tensor `[samples, ...]` or a list with an item for each sample."""
        if isinstance(latents, Tensor):
            return Batch(latents.shape[0] if latents.ndim else 1)
        return Batch(len(latents), True) if isinstance(latents, list) else Batch(1)

    def sizes(self, parts: int) -> list[int]:
        """Number of samples in each part. They differ by one at most."""
        return [self.samples // parts + (part < self.samples % parts) for part in range(parts)]

    def part_of(self, value: Any, part: int, parts: int) -> Any:
        """One part of the samples in `value`, the arguments or the output of a call. Tensors `[samples, ...]` and
        lists with an item for each sample are cut, also within tuples and dicts; everything else is the same for all
        samples."""
        if parts == 1:
            return value
        sizes = self.sizes(parts)
        start = sum(sizes[:part])
        return self._cut(value, start, start + sizes[part])

    def _cut(self, value: Any, start: int, end: int) -> Any:
        if isinstance(value, Tensor):
            return value[start:end] if self._is_batch(value) else value
        if isinstance(value, list):
            return value[start:end] if self._is_list(value) else [self._cut(each, start, end) for each in value]
        if isinstance(value, tuple):
            return like(value, [self._cut(each, start, end) for each in value])
        if isinstance(value, Mapping):
            return updated(value, {key: self._cut(each, start, end) for key, each in value.items()})
        return value

    def _is_batch(self, value: Tensor) -> bool:
        return value.ndim > 0 and value.shape[0] == self.samples

    def _is_list(self, value: list[Any]) -> bool:
        """Whether a list has an item for each sample. A list of batches, such as a ControlNet's outputs for each block,
        may have the same length."""
        if len(value) != self.samples:
            return False
        return self.listed or not all(
            isinstance(each, Tensor) and each.ndim > 1 and self._is_batch(each) for each in value
        )

    def merged(self, parts: list[Any], full: Any) -> Any:
        """The opposite of `part_of`.

        Args:
            parts: every part of an output, in order.
            full: a nest like the full output, with tensors on any device, which tells what was cut.
        """
        if len(parts) == 1:
            return parts[0]
        if isinstance(full, Tensor):
            return torch.cat(parts) if self._is_batch(full) else parts[0]
        if isinstance(full, list) and self._is_list(full):
            return [each for part in parts for each in part]
        if isinstance(full, (list, tuple)):
            return like(full, [self.merged([part[i] for part in parts], each) for i, each in enumerate(full)])
        if isinstance(full, Mapping):
            return updated(full, {key: self.merged([part[key] for part in parts], each) for key, each in full.items()})
        return full

    def joined(self, output: Any, groups: Groups) -> Any:
        """The output for all samples, from every group's part. All ranks must call this.

        Args:
            output: this group's output: tensors `[samples of the group, ...]`, or lists with an item for each of them.
            groups: the groups.
        """
        sizes = self.sizes(groups.count)
        if isinstance(output, Tensor):
            return groups.gather(output.contiguous(), sizes) if output.ndim else output
        mine = Batch(sizes[groups.index], self.listed)
        if isinstance(output, list) and all(map(torch.is_tensor, output)) and mine._is_list(output):
            return list(groups.gather(torch.stack(output), sizes).unbind(0))
        if isinstance(output, (list, tuple)):
            return like(output, [self.joined(each, groups) for each in output])
        if isinstance(output, Mapping):
            return updated(output, {key: self.joined(each, groups) for key, each in output.items()})
        return output
