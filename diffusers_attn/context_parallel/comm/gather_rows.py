"""Gathers the rows of all ranks in one call, through symmetric memory where a group has it.

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
from .gathered_rows import EVERYONE, OTHERS, GatheredRows
from .group import Group
from .symmetric_gather import SymmetricGather, opened_gather

_MOST = 64 * 2**20
"""Largest symmetric memory for rows, in bytes, unless attention has allocated more. Larger rows go through a
collective."""
_TICKET = -1
"""The ticket of rows; attention calls have tickets from 0."""


def gather_rows(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, in their order. All ranks of `group` must call this.

    Args:
        tensor: this rank's rows, `[sizes[group.rank], ...]`.
        sizes: number of rows of each rank; 0 is accepted.
    """
    if group.size == 1:
        return tensor
    gather = None if torch.compiler.is_compiling() else opened_gather(group.name)
    if gather is not None:
        rows = tensor.contiguous().view(1, tensor.shape[0], math.prod(tensor.shape[1:]))
        layout = GatheredRows.of([rows], sizes, group.rank, EVERYONE)
        if gather.has_room(layout.length * tensor.itemsize, _MOST):
            return _pushed(gather, rows, layout, tuple(sizes)).view(sum(sizes), *tensor.shape[1:])
    return collectives.wait(collectives.start_gather(tensor, sizes, group), group)


def first_ranks_rows(tensor: Tensor, rows: int, group: Group) -> Tensor:
    """The first rank's `tensor`, which has so many rows. Of the others', only dtype and further sizes matter. All ranks
    of `group` must call this. The result may be memory in which the next gather of the group but one is received, so
    copy it before the next one."""
    sizes = (rows, *[0] * (group.size - 1))
    own = tensor if group.rank == 0 else tensor[:0]
    gather = None if torch.compiler.is_compiling() else opened_gather(group.name)
    flat = own.contiguous().view(1, own.shape[0], math.prod(own.shape[1:]))
    if gather is None or not gather.has_room(
        GatheredRows.of([flat], sizes, group.rank, EVERYONE).length * flat.itemsize, _MOST
    ):
        return gather_rows(own, sizes, group)
    gather.start([flat], sizes, _TICKET, OTHERS)
    (arrived,) = GatheredRows.of([flat], sizes, group.rank, OTHERS).views(gather.finish(_TICKET))
    return tensor if group.rank == 0 else arrived.view(rows, *tensor.shape[1:])


def _pushed(gather: SymmetricGather, rows: Tensor, layout: GatheredRows, sizes: tuple[int, ...]) -> Tensor:
    """All ranks' rows, `[1, sum(sizes), elements]`."""
    gather.start([rows], sizes, _TICKET, EVERYONE)
    (arrived,) = layout.views(gather.finish(_TICKET))
    return arrived.clone()  # the memory is written to again by the next call but one
