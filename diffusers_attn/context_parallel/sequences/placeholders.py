"""Placeholders: what a rank is given where it has no token of a short sequence, and a model's code needs one.

Code that infers a dimension of what it reshapes does not run on an empty tensor. So such a rank is given the sequence's
first token. Attention and gathering take it out, and where a result goes back into the model, zeros are in its place:
no other token learns of it, and no gradient comes from it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, cat

from .sharding import Span, take


class LocalTokens(NamedTuple):
    """Which of the tokens that one rank's model sees are its own; the rest are placeholders."""

    seen: int
    spans: tuple[Span, ...]

    def take_out(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor`, which has all tokens along `dim`, without placeholders."""
        return take(tensor, self.spans, dim)

    def put_back(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor`, which has none, with zeros for them."""
        pieces, done, at = [], 0, 0
        for start, length in (*self.spans, (self.seen, 0)):
            shape = list(tensor.shape)
            shape[dim] = start - at
            pieces += [tensor.new_zeros(shape), tensor.narrow(dim, done, length)]
            done, at = done + length, start + length
        return cat(pieces, dim=dim)
