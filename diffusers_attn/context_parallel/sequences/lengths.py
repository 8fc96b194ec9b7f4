"""The lengths of a forward's sequences, stored so that one compiled graph serves all lengths.

Dynamo treats an int in an attribute as a constant, and compiles again for every other value. It treats the size of a
tensor as dynamic once it has seen two values. So a length is stored as the size of a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor

_APART = 2**26
"""Offset of the stored sizes. Dynamo treats dimensions of equal size as one dimension, and a size of 0 or 1 as a
constant. So n times this is added to the n-th length."""


class Lengths(MutableMapping[str, int]):
    """Number of tokens of each sequence, by its name."""

    def __init__(self) -> None:
        self._sizes: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name].shape[0] - self._offsets[name]

    def __setitem__(self, name: str, length: int) -> None:
        offset = self._offsets.get(name, _APART * (1 + len(self._offsets)))
        self._offsets[name] = offset
        self._sizes[name] = torch.empty((offset + length, 0), device="meta")

    def __delitem__(self, name: str) -> None:
        del self._sizes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose first dimensions store the lengths."""
        return tuple(self._sizes.values())

    def are_known(self) -> bool:
        """Whether there is any length. (Dynamo of PyTorch 2.11 does not support the truth value of a mapping.)"""
        return len(self._sizes) > 0

    def __repr__(self) -> str:
        return repr(dict(self))
