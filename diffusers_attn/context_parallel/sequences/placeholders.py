"""Placeholders: a rank without a token of a short sequence receives the sequence's first token.

Code that infers a dimension when it reshapes does not run on an empty tensor. Attention and gathering leave the
placeholder out, and attention returns zeros for it, so that it influences no other token and no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, cat

from .sharding import Span, take


class LocalTokens(NamedTuple):
    """A rank's own tokens among those that its model has. The others are placeholders, or replicated tokens that
    another rank contributes."""

    seen: int
    """Number of tokens that the model has."""
    spans: tuple[Span, ...]
    """The rank's own tokens among them."""

    def take_out(self, tensor: Tensor, dim: int) -> Tensor:
        """The own tokens of `tensor`, which has all tokens along `dim`."""
        return take(tensor, self.spans, dim)

    def put_back(self, tensor: Tensor, dim: int) -> Tensor:
        """The inverse: `tensor` has the own tokens, and zeros are inserted for the others."""
        pieces, taken, end = [], 0, 0
        for start, length in (*self.spans, (self.seen, 0)):
            shape = list(tensor.shape)
            shape[dim] = start - end
            pieces += [tensor.new_zeros(shape), tensor.narrow(dim, taken, length)]
            taken, end = taken + length, start + length
        return cat(pieces, dim=dim)
