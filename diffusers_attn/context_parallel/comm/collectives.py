"""Collectives. All of them are one all-to-all, in which every rank chooses how many rows it sends to each other rank.

A gather sends the same rows to all ranks. A step of a ring sends to the next rank only. A reduction sends to each rank
the rows that it owns, and a local sum follows. All sizes may differ and may be zero, with NCCL as with gloo, and every
form is a functional collective that `torch.compile` traces.

Exchanged tensors have the sequence first, `[sequence, batch, heads, head_dim]`: the collective then concatenates parts
of different lengths, and attention uses the received tensor without another copy.

Every `start_...` returns a tensor that is still in flight; `wait` for it before reading it, and compute meanwhile.
Between GPUs that reach each other's memory, `symmetric_gather` is faster for keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...recompute import in_backward_id
from ..compile.inductor import prepare_for_exchanges
from . import one_thread, rank_progress
from .group import Group


def start_all_to_all(tensor: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Sends the first `send[0]` rows of `tensor` to rank 0 of `group`, the next `send[1]` to rank 1, and so on;
    `receive` is the number of rows from each rank. Received rows are in the order of the ranks."""
    if group.size == 1:
        return tensor
    if torch.compiler.is_compiling():
        prepare_for_exchanges()
        return torch.ops._c10d_functional.all_to_all_single(tensor.contiguous(), list(receive), list(send), group.name)
    if in_backward_id() != -1:
        one_thread.take_in_backward(group.name)
    try:
        return torch.ops._c10d_functional.all_to_all_single(tensor.contiguous(), list(receive), list(send), group.name)
    except RuntimeError as error:
        raise rank_progress.explained(error, group.name) from error


def wait(tensor: Tensor, group: Group) -> Tensor:
    """`tensor` after it has arrived."""
    if group.size == 1:
        return tensor
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(tensor)
    try:
        return torch.ops._c10d_functional.wait_tensor(tensor)
    except RuntimeError as error:
        raise rank_progress.explained(error, group.name) from error


def depends_on(tensor: Tensor, *others: Tensor | None, sent_over: Group | None = None) -> Tensor:
    """`tensor`, which in a compiled graph depends on `others`.

    All ranks must make the same exchanges in the same order, but a compiler sees the graph of one rank only. It removes
    an exchange whose result is unused, so the result of a rank that does not need the received data depends on it. It
    also moves an exchange that does not depend on gradients into the forward, and merges two exchanges that send the
    same data, such as zeros. So the data that a backward sends depends on its gradients. The dependency is the addition
    of a zero from an operator that is opaque to compilers.

    Args:
        sent_over: the group over which `tensor` is sent next. In a compiled graph the operator checks that no other
            thread uses the group, as `start_all_to_all` and the hook that begins a forward do otherwise.
    """
    if torch.compiler.is_compiling():
        given = [other.detach() for other in others if other is not None]
        if given:
            group = "" if sent_over is None else sent_over.name
            return tensor + torch.ops.diffusers_attn.zero_after.default(given, group).to(tensor.dtype)
    return tensor


# Not a `torch.library.custom_op`, which takes three times as long to call.
_library = torch.library.Library("diffusers_attn", "FRAGMENT")
_library.define("zero_after(Tensor[] others, str group) -> Tensor")


def _zero_after(others: list[Tensor], group: str) -> Tensor:
    if group and in_backward_id() != -1:
        one_thread.take_in_backward(group)
    elif group:
        one_thread.take_in_graph(group)
    return others[0].new_zeros((), dtype=torch.float32)


_library.impl("zero_after", _zero_after, "CompositeExplicitAutograd")


@torch.library.register_fake("diffusers_attn::zero_after", lib=_library)
def _(others, group):  # type: ignore[no-untyped-def]
    return others[0].new_empty((), dtype=torch.float32)


def start_gather(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, in their order. `sizes` are the numbers of rows of the ranks."""
    if group.size == 1:
        return tensor
    send = [sizes[group.rank]] * group.size
    return start_all_to_all(tensor.repeat(group.size, *[1] * (tensor.ndim - 1)), send, sizes, group)


def start_gather_others(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The rows of all other ranks, in their order."""
    copies = tensor.repeat(group.size - 1, *[1] * (tensor.ndim - 1)) if group.size > 2 else tensor
    send = [0 if rank == group.rank else sizes[group.rank] for rank in range(group.size)]
    receive = [0 if rank == group.rank else size for rank, size in enumerate(sizes)]
    return start_all_to_all(copies, send, receive, group)


def start_return_to_owners(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The adjoint of `start_gather_others` without its sum: sends to each other rank the rows that it owns. The result,
    `[(ranks - 1) * own rows, ...]`, holds the contributions of the other ranks to this rank's rows."""
    send = [0 if rank == group.rank else size for rank, size in enumerate(sizes)]
    receive = [0 if rank == group.rank else sizes[group.rank] for rank in range(group.size)]
    return start_all_to_all(tensor, send, receive, group)


def start_to_next(tensor: Tensor, rows_of_previous: int, group: Group) -> Tensor:
    """One step of a ring: sends `tensor` to the next rank and receives `rows_of_previous` rows of the previous rank."""
    send, receive = [0] * group.size, [0] * group.size
    send[(group.rank + 1) % group.size] = tensor.shape[0]
    receive[(group.rank - 1) % group.size] = rows_of_previous
    return start_all_to_all(tensor, send, receive, group)


def sum_of_parts(tensor: Tensor, parts: int) -> Tensor:
    """The sum of `parts` tensors that are concatenated in dimension 0, in float32 at least."""
    rows = tensor.shape[0] // parts
    return tensor.unflatten(0, (parts, rows)).sum(dim=0, dtype=torch.promote_types(tensor.dtype, torch.float32))
