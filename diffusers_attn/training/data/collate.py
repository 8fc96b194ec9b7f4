"""Collates examples' tensors to a batch; tensors of varying length are padded and get a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import TrainingDataError


def varying(shapes: Iterable[Mapping[str, tuple[int, ...]]]) -> frozenset[str]:
    """Names of the tensors whose first dimension varies.

    Args:
        shapes: shapes by name of every example in the data, not only of a batch, so that all batches and all ranks
            have the same tensors.

    Raises:
        TrainingDataError: examples have different names, or differ in another dimension than the first.
    """
    found: set[str] = set()
    first: Mapping[str, tuple[int, ...]] | None = None
    for each in shapes:
        if first is None:
            first = each
            continue
        if each.keys() != first.keys():
            raise TrainingDataError(
                f"one example has the tensors {', '.join(sorted(each))}, another one {', '.join(sorted(first))}. The "
                "encoder must return the same names for all examples."
            )
        for name, shape in each.items():
            if len(shape) != len(first[name]) or shape[1:] != first[name][1:]:
                raise TrainingDataError(
                    f"{name!r} has shape {list(first[name])} in one example and {list(shape)} in another; only the "
                    "first dimension may vary."
                )
            if shape != first[name]:
                found.add(name)
    return frozenset(found)


def collate(rows: Sequence[Mapping[str, Tensor]], padded: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Makes a batch of examples.

    Args:
        rows: each example's tensors by name, with the same names.
        padded: names of tensors [length, ...] whose lengths vary. They are padded with zeros at the end. The batch
            gets a `<name>_mask`, bool [batch, length], False for padding, unless `rows` have one.

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
