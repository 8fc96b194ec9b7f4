"""Keys and values on their way between ranks: around a ring, or from all other ranks at once.

There is one class for each pattern and transport; `RINGS` and `FETCHES` list them by the transport's name. With the
collective transport, the blocks of a ring travel from rank to rank. Where ranks write into each other's memory
(`symmetric_gather`), every rank sends its own block in each step, one rank further than in the step before. A rank
receives the same blocks in the same order. A key mask is small and always travels through collectives.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..comm import collectives
from ..comm.collectives import depends_on
from ..comm.gather_in_flight import GatherInFlight
from ..comm.transport import COLLECTIVE, SYMMETRIC
from .block_attention import Block, BlockAttention, make_block


def start_rotation(block: Block, owner: int, call: BlockAttention) -> Block:
    """Sends the block of rank `owner` to the next rank; returns that of the rank before `owner`, still in flight."""
    rows = call.key_shards.sizes[(owner - 1) % call.group.size]
    return [collectives.start_to_next(tensor, rows, call.group) for tensor in block]


class CollectiveRing(NamedTuple):
    """The block that a rank holds in one step of a ring, and the next block, which is in flight."""

    call: BlockAttention
    step: int
    block: Block
    next_block: Block

    @staticmethod
    def start(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        call: BlockAttention,
        grad_out: Tensor | None = None,
    ) -> CollectiveRing:
        """Holds and sends this rank's own block, from `[batch, seq, ...]` tensors. In a compiled graph the send comes
        after `grad_out`, if it is given."""
        return CollectiveRing.send(call, 0, make_block(key, value, key_mask, grad_out, call.group))

    @staticmethod
    def send(call: BlockAttention, step: int, block: Block) -> CollectiveRing:
        """Holds `block` in `step` and sends it on, except in the last step."""
        owner = (call.group.rank - step) % call.group.size
        is_last = step + 1 == call.group.size
        return CollectiveRing(call, step, block, [] if is_last else start_rotation(block, owner, call))

    def next(self, computed: Tensor) -> CollectiveRing:
        """Waits for the next block, holds it and sends it on. `computed` is a result from the present block."""
        arrived = [collectives.wait(tensor, self.call.group) for tensor in self.next_block]
        return CollectiveRing.send(self.call, self.step + 1, arrived)


class SymmetricRing(NamedTuple):
    """`CollectiveRing` for ranks that write keys and values into each other's memory."""

    key_value: Block
    gather: GatherInFlight
    masks: CollectiveRing

    @property
    def block(self) -> Block:
        return [*self.key_value, *self.masks.block]

    @staticmethod
    def start(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        call: BlockAttention,
        grad_out: Tensor | None = None,
    ) -> SymmetricRing:
        """As `CollectiveRing.start`."""
        key, value = (depends_on(tensor, grad_out, sent_over=call.group).contiguous() for tensor in (key, value))
        gather = GatherInFlight.start(
            query, key, value, call.key_shards.sizes, call.group, needs_grad=call.kernel.needs_grad, shift=1
        )
        masks = [] if key_mask is None else [depends_on(key_mask, grad_out).transpose(0, 1).contiguous()]
        return SymmetricRing(_sequence_first(gather.tensors[:2]), gather, CollectiveRing.send(call, 0, masks))

    def next(self, computed: Tensor) -> SymmetricRing:
        """As `CollectiveRing.next`."""
        key_value = _sequence_first(self.gather.finish(computed))
        masks = self.masks.next(computed)
        is_last = masks.step + 1 == masks.call.group.size
        return SymmetricRing(key_value, self.gather if is_last else self.gather.send(masks.step + 1), masks)


class CollectiveFetch(NamedTuple):
    """A rank's own block, and the blocks of all other ranks, which are in flight."""

    call: BlockAttention
    block: Block
    others: Block

    @staticmethod
    def start(
        query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, call: BlockAttention
    ) -> CollectiveFetch:
        """Sends this rank's own block, from `[batch, seq, ...]` tensors, to all other ranks."""
        return CollectiveFetch.send(call, make_block(key, value, key_mask))

    @staticmethod
    def send(call: BlockAttention, block: Block) -> CollectiveFetch:
        others = [collectives.start_gather_others(tensor, call.key_shards.sizes, call.group) for tensor in block]
        return CollectiveFetch(call, block, others)

    def finish(self, computed: Tensor) -> Block:
        """Waits for the block of all other ranks. `computed` is a result that was computed since the start."""
        return [collectives.wait(tensor, self.call.group) for tensor in self.others]


class SymmetricFetch(NamedTuple):
    """`CollectiveFetch` for ranks that write keys and values into each other's memory."""

    key_value: Block
    gather: GatherInFlight
    masks: CollectiveFetch

    @property
    def block(self) -> Block:
        return [*self.key_value, *self.masks.block]

    @staticmethod
    def start(
        query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, call: BlockAttention
    ) -> SymmetricFetch:
        """As `CollectiveFetch.start`."""
        gather = GatherInFlight.start(
            query, key.contiguous(), value.contiguous(), call.key_shards.sizes, call.group,
            needs_grad=call.kernel.needs_grad,
        )  # fmt: skip
        masks = [] if key_mask is None else [key_mask.transpose(0, 1)]
        return SymmetricFetch(_sequence_first(gather.tensors[:2]), gather, CollectiveFetch.send(call, masks))

    def finish(self, computed: Tensor) -> Block:
        """As `CollectiveFetch.finish`."""
        masks = self.masks.finish(computed)
        return [*_sequence_first(self.gather.finish(computed)), *masks]


def _sequence_first(tensors: list[Tensor] | tuple[Tensor, ...]) -> Block:
    return [tensor.transpose(0, 1) for tensor in tensors]


RINGS: dict[str, type[CollectiveRing] | type[SymmetricRing]] = {COLLECTIVE: CollectiveRing, SYMMETRIC: SymmetricRing}
FETCHES: dict[str, type[CollectiveFetch] | type[SymmetricFetch]] = {
    COLLECTIVE: CollectiveFetch,
    SYMMETRIC: SymmetricFetch,
}
