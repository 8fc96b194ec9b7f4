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
from .symmetric_gather import opened_gather

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
    arrived = _through_symmetric_memory(tensor, sizes, group, EVERYONE)
    if arrived is not None:
        return arrived.clone()  # the memory is written to again by the next call but one
    return collectives.wait(collectives.start_gather(tensor, sizes, group), group)


def first_ranks_rows(tensor: Tensor, rows: int, group: Group) -> Tensor:
    """The first rank's `tensor`. All ranks of `group` must call this.

    The result may lie in memory that the next gather of the group but one overwrites, so copy it before the next one.

    Args:
        tensor: the rows, `[rows, ...]`; of other ranks only dtype and further sizes matter.
        rows: number of rows of the first rank.
    """
    sizes = (rows, *[0] * (group.size - 1))
    own = tensor if group.rank == 0 else tensor[:0]
    arrived = _through_symmetric_memory(own, sizes, group, OTHERS)
    if arrived is None:
        return gather_rows(own, sizes, group)
    return tensor if group.rank == 0 else arrived


def _through_symmetric_memory(tensor: Tensor, sizes: Sequence[int], group: Group, shift: int) -> Tensor | None:
    """The rows of other ranks, or of all, where they have arrived; None if the group has no symmetric memory, or too
    little."""
    gather = None if torch.compiler.is_compiling() else opened_gather(group.name)
    if gather is None:
        return None
    rows = tensor.contiguous().view(1, tensor.shape[0], math.prod(tensor.shape[1:]))
    needed = GatheredRows.of([rows], sizes, group.rank, EVERYONE).length  # equal on all ranks
    if not gather.has_room(needed * tensor.itemsize, _MOST):
        return None
    gather.start([rows], tuple(sizes), _TICKET, shift)
    (arrived,) = GatheredRows.of([rows], sizes, group.rank, shift).views(gather.finish(_TICKET))
    return arrived.view(arrived.shape[1], *tensor.shape[1:])
