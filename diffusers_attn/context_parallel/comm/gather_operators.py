"""The gather as two operators for compiled graphs, so that attention to the local keys can run between them.

They declare that they change their arguments, although they do not. So readers of these tensors keep their order
relative to the operators, and the memory that is sent stays allocated until the copies are made. (A compiler may give
each operator its own copy of a tensor that is only read.) The ticket pairs a start with its finish, and keeps two calls
with equal data apart. `compile/overlap_pass.py` finds the operators by name, and their arguments by position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .symmetric_gather import gather_of

_library = torch.library.Library("diffusers_attn", "FRAGMENT")
_library.define("symmetric_gather_start(Tensor(a!)[] tensors, SymInt[] sizes, str group, int ticket, int shift) -> ()")
_library.define(
    "symmetric_gather_finish(Tensor(a!)[] tensors, Tensor[] computed, SymInt length, str group, int ticket) -> Tensor"
)


def _start(tensors: list[Tensor], sizes: Sequence[int], group: str, ticket: int, shift: int) -> None:
    gather_of(group).start(tensors[:2], sizes, ticket, shift)


def _finish(tensors: list[Tensor], computed: list[Tensor], length: int, group: str, ticket: int) -> Tensor:
    return gather_of(group).finish(ticket)


_library.impl("symmetric_gather_start", _start, "CompositeExplicitAutograd")
_library.impl("symmetric_gather_finish", _finish, "CompositeExplicitAutograd")


@torch.library.register_fake("diffusers_attn::symmetric_gather_start", lib=_library)
def _(tensors, sizes, group, ticket, shift):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("diffusers_attn::symmetric_gather_finish", lib=_library)
def _(tensors, computed, length, group, ticket):  # type: ignore[no-untyped-def]
    return tensors[0].new_empty(length)


_tickets = itertools.count(1)


@torch._dynamo.assume_constant_result
def new_ticket() -> int:
    """A number that no other call of this process has, as a constant of the graph that is traced."""
    return next(_tickets)


# The overloads declare the mutation, so that the compiler does not remove the calls.
start = torch.ops.diffusers_attn.symmetric_gather_start.default
"""Called with (tensors, sizes, group name, ticket, shift)."""
finish = torch.ops.diffusers_attn.symmetric_gather_finish.default
"""Called with (tensors, results computed since the start, length of the received data, group name, ticket)."""
