"""Keys and values on their way to other ranks, in eager mode and in compiled graphs: the interface for strategies.

Keys and values are sent from where they are, by two copies to each rank. A compiled graph packs them into one tensor if
that is faster (`packs`), and then makes one copy to each rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import spans
from ...providers import hardware
from ...recompute import in_backward_id
from ...tracing.symbolic import ceil_div, constant
from ..compile.inductor import prepare_for_exchanges
from . import gather_operators, one_thread
from .collectives import depends_on
from .gathered_rows import OTHERS, GatheredRows
from .group import Group
from .packed_kv import Tails, pack, tails_of, unpack
from .symmetric_gather import gather_of


class GatherInFlight(NamedTuple):
    """Key and value on their way to the other ranks of a group."""

    key_value: list[Tensor]
    """Key and value, which computation before `finish` must use in place of the originals."""
    sent: list[Tensor]
    """The tensors to send: key and value, or both in one."""
    order: list[Tensor]
    """The query, if a compiled graph may send before it is computed."""
    tails: Tails
    sizes: tuple[int, ...]
    group: Group
    ticket: int = 0
    shift: int = OTHERS

    @staticmethod
    def start(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sizes: tuple[int, ...],
        group: Group,
        *,
        needs_grad: bool,
        shift: int = OTHERS,
    ) -> GatherInFlight:
        """Sends `key` and `value`, `[batch, rows, heads, head_dim]`, to other ranks of `group`.

        Args:
            query: the query that attends to them.
            sizes: number of rows of every rank.
            needs_grad: whether key and value may be saved for a backward.
            shift: distance to the receiving rank; or OTHERS, or EVERYONE.
        """
        tails = tails_of(key, value)
        if not torch.compiler.is_compiling():
            key_value = [key.contiguous(), value.contiguous()]
            return GatherInFlight(key_value, key_value, [], tails, sizes, group)._start(shift)
        if needs_grad:
            # Saved tensors must not be declared changed. So a copy is sent, which depends on the query.
            packed = depends_on(pack(key, value), query, sent_over=group)
            return GatherInFlight(unpack(packed, tails), [packed], [], tails, sizes, group)._start(shift)
        if packs(value, sizes):
            packed = pack(key, value)
            return GatherInFlight(unpack(packed, tails), [packed], [query], tails, sizes, group)._start(shift)
        key_value = [key.contiguous(), value.contiguous()]
        return GatherInFlight(key_value, key_value, [query], tails, sizes, group)._start(shift)

    def send(self, shift: int) -> GatherInFlight:
        """Sends the same to another rank."""
        return self._start(shift)

    def _start(self, shift: int) -> GatherInFlight:
        if not torch.compiler.is_compiling():
            if in_backward_id() != -1:
                one_thread.take_in_backward(self.group.name)
            start = gather_of(self.group.name).start
            if spans.is_on():
                start = spans.within(start, spans.EXCHANGE, "symmetric memory")
            start(self.sent, self.sizes, shift=shift)
            return self._replace(shift=shift)
        prepare_for_exchanges()
        ticket = gather_operators.new_ticket()
        tensors = [*self.sent, *self.order]
        gather_operators.start(tensors, self.sizes, self.group.name, ticket, shift, len(self.sent))
        return self._replace(shift=shift, ticket=ticket)

    def finish(self, computed: Tensor) -> list[Tensor]:
        """Key and value of the rank that is `shift` before, of all other ranks, or of all ranks, in their order. They
        may be read until the next call starts (in a ring, the next but one).

        Args:
            computed: a result that was computed since the start.
        """
        received = GatheredRows.of(self.sent, self.sizes, self.group.rank, self.shift)
        if torch.compiler.is_compiling():
            flat = gather_operators.finish(
                [*self.sent, *self.order], [computed], received.length, self.group.name, self.ticket
            )
        else:
            finish = gather_of(self.group.name).finish
            if spans.is_on():
                finish = spans.within(finish, spans.EXCHANGE, "symmetric memory")
            flat = finish(self.ticket)
        parts = received.views(flat)
        return parts if len(parts) == 2 else unpack(parts[0], self.tails)


def packs(value: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether the graph that is being compiled packs keys and values.

    The kernel that computes the keys writes into the packed tensor, but values come from a matrix product and are
    copied once more. One copy to each other rank is saved. So packing suits images on three GPUs or more, rather than
    videos. The decision depends only on values that are equal on all ranks.
    """
    row = constant(value.shape[2]) * constant(value.shape[3]) * value.element_size()
    most = (len(sizes) - 1) * hardware.SECONDS_OF_A_COPY * hardware.REFERENCE.memory_bytes_per_second / (2 * row)
    return True if value.shape[0] * ceil_div(sum(sizes), len(sizes)) < most else False
