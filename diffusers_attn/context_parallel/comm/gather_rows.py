"""The rows of all ranks, in one call, by the fastest way that a group has.

Where GPUs reach each other's memory (`symmetric_gather`), rows go through it, as keys and values do. NCCL then has
nothing to do in a forward and makes no communicator, which takes hundreds of MiB of every GPU. Elsewhere rows go by the
all-to-all that attention uses: another collective would have NCCL allocate further buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import collectives
from .gathered_kv import EVERYONE, GatheredKV
from .group import Group
from .symmetric_gather import SymmetricGather, opened_gather

_MOST = 64 * 2**20
"""bytes of symmetric memory that are taken for rows, where attention has not taken more already. What needs more goes
by a collective."""
_TICKET = -1
"""which no attention call has."""


def gather_rows(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, in their order. All ranks of `group` must call this.

    Args:
        tensor: this rank's rows, `[sizes[group.rank], ...]`.
        sizes: how many rows each rank has; 0 is accepted.
    """
    if group.size == 1:
        return tensor
    if not torch.compiler.is_compiling():
        gather = opened_gather(group.name)
        if gather is not None and gather.has_room(sum(sizes) * math.prod(tensor.shape[1:]) * tensor.itemsize, _MOST):
            return _pushed(gather, tensor, tuple(sizes), group)
    return collectives.wait(collectives.start_gather(tensor, sizes, group), group)


def first_ranks_rows(tensor: Tensor, rows: int, group: Group) -> Tensor:
    """The first rank's `tensor`, which has so many rows. Of the others', only dtype and further sizes matter. All ranks
    of `group` must call this."""
    sizes = (rows, *[0] * (group.size - 1))
    return gather_rows(tensor if group.rank == 0 else tensor[:0], sizes, group)


def _pushed(gather: SymmetricGather, tensor: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    rows = tensor.contiguous().view(1, tensor.shape[0], 1, math.prod(tensor.shape[1:]))
    nothing = rows[..., :0]
    gather.start(rows, nothing, sizes, _TICKET, EVERYONE)
    flat = gather.finish(_TICKET)
    arrived, _ = GatheredKV.of(rows, nothing, sizes, group.rank, EVERYONE).views(flat)
    # The memory is written to again by the next call but one.
    return arrived.reshape(sum(sizes), *tensor.shape[1:]).clone()
