"""How long the sequences of a forward are, kept so that one compiled graph serves all lengths.

Dynamo takes an int that it finds in a module's attributes for a constant, and compiles anew for every other. The size
of a tensor it takes for one that changes, once it has seen two. So a length is kept as the size of a tensor without
elements.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor

_APART = 2**26
"""Dynamo takes dimensions that are of one size for one dimension, and a size of 0 or 1 for a constant. Of a length it
is to believe neither, so the length number n is kept as a size that is n times this larger."""


class Lengths(MutableMapping[str, int]):
    """Tokens of each sequence, by its name."""

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
        """Those whose first dimension keeps a length."""
        return tuple(self._sizes.values())

    def are_known(self) -> bool:
        """Whether there is any. (Dynamo of PyTorch 2.11 does not know the truth of a mapping.)"""
        return len(self._sizes) > 0

    def __repr__(self) -> str:
        return repr(dict(self))
