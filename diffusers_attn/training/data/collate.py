"""Tensors of several examples as one batch; those of varying lengths padded to the longest, with a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import TrainingDataError


def varying(shapes: Iterable[Mapping[str, tuple[int, ...]]]) -> frozenset[str]:
    """Names of tensors whose first dimension is not the same in all examples of the data.

    Known from all of the data, and not from one batch, so that all batches and all ranks have the same tensors.

    Raises:
        TrainingDataError: examples have other names, or differ in other dimensions than the first.
    """
    found: set[str] = set()
    first: Mapping[str, tuple[int, ...]] | None = None
    for each in shapes:
        if first is None:
            first = each
            continue
        if each.keys() != first.keys():
            raise TrainingDataError(
                f"an example has the tensors {', '.join(sorted(each))}, and another one {', '.join(sorted(first))}. "
                "The encoder must give the same names for all."
            )
        for name, shape in each.items():
            if len(shape) != len(first[name]) or shape[1:] != first[name][1:]:
                raise TrainingDataError(
                    f"{name!r} has the shape {list(first[name])} in one example and {list(shape)} in another; only the "
                    "first dimension may vary."
                )
            if shape != first[name]:
                found.add(name)
    return frozenset(found)


def collate(rows: Sequence[Mapping[str, Tensor]], padded: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """One batch of `rows`.

    Args:
        rows: tensors by name, the same names in each.
        padded: names of tensors [length, ...] whose lengths vary. They get zeros at the end, and unless `rows` have a
            `<name>_mask` of their own, there is one in the batch: bool [batch, length], True for what was there.

    Returns:
        Tensors [batch, ...].
    """
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name not in padded:
            batch[name] = torch.stack(tensors)
            continue
        longest = max(tensor.shape[0] for tensor in tensors)
        batch[name] = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[1:])
        mask = torch.zeros(len(tensors), longest, dtype=torch.bool)
        for i, tensor in enumerate(tensors):
            batch[name][i, : tensor.shape[0]] = tensor
            mask[i, : tensor.shape[0]] = True
        if f"{name}_mask" not in rows[0] and not name.endswith("_mask"):
            batch[f"{name}_mask"] = mask
    return batch
