"""Keys and values on their way to other ranks, in eager mode and in compiled graphs: the interface for strategies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import spans
from ...recompute import in_backward_id
from ..compile.inductor import prepare_for_exchanges
from . import gather_operators, one_thread
from .collectives import depends_on
from .gathered_rows import OTHERS, GatheredRows
from .group import Group
from .symmetric_gather import gather_of


class GatherInFlight(NamedTuple):
    """Key and value on their way to the other ranks of a group."""

    key_value: list[Tensor]
    """Key and value, which computation before `finish` must use in place of the originals."""
    order: list[Tensor]
    """The query, if a compiled graph may send before it is computed."""
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
        if needs_grad and torch.compiler.is_compiling():
            # Saved tensors must not be declared changed. So copies are sent, which depend on the query.
            copies = [depends_on(key.contiguous(), query, sent_over=group), depends_on(value.contiguous(), query)]
            return GatherInFlight(copies, [], sizes, group)._start(shift)
        order = [query] if torch.compiler.is_compiling() else []
        return GatherInFlight([key.contiguous(), value.contiguous()], order, sizes, group)._start(shift)

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
            start(self.key_value, self.sizes, shift=shift)
            return self._replace(shift=shift)
        prepare_for_exchanges()
        ticket = gather_operators.new_ticket()
        gather_operators.start([*self.key_value, *self.order], self.sizes, self.group.name, ticket, shift)
        return self._replace(shift=shift, ticket=ticket)

    def finish(self, computed: Tensor) -> list[Tensor]:
        """Key and value of the rank that is `shift` before, of all other ranks, or of all ranks, in their order. They
        may be read until the next call starts (in a ring, the next but one).

        Args:
            computed: a result that was computed since the start.
        """
        received = GatheredRows.of(self.key_value, self.sizes, self.group.rank, self.shift)
        if torch.compiler.is_compiling():
            flat = gather_operators.finish(
                [*self.key_value, *self.order], [computed], received.length, self.group.name, self.ticket
            )
        else:
            finish = gather_of(self.group.name).finish
            if spans.is_on():
                finish = spans.within(finish, spans.EXCHANGE, "symmetric memory")
            flat = finish(self.ticket)
        return received.views(flat)
