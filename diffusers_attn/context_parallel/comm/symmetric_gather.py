"""Keys and values sent by copy engines: every rank writes them directly into the memory of other ranks. A gather
writes to all ranks at once, a ring to one rank in each step.

    this stream:   ... key, value | attention to the local keys        | attention to the others' ...
    side stream:                  | copies to every other rank, barrier |

The copies occupy no multiprocessor, and the receiver copies nothing: attention reads the data where it arrived. The
only cross-rank synchronisation is one barrier per call, after the copies. This suffices because each rank has several
slots to receive in, and calls use them in turn:

    A rank reaches the barrier of call n (on its side stream) after all work that its main stream received before call
    n. In a gather this includes the attention of call n-1. A rank starts the copies of call n+1 after the barrier of
    call n. So when these copies arrive, every rank has finished its attention of call n-1, which was the last reader of
    the slot that call n+1 writes, with two slots.

    In a ring, call n starts before the attention to the data of call n-1, and runs concurrently with it. Everything is
    one call later, so there are three slots.

A CUDA graph repeats its calls with the captured slots, any number of times and between any other calls. So a captured
call, and every later call, begins with one more barrier, on the main stream and before the local attention: after it
every rank has finished reading all received data. In one graph (`in_one_graph`) only the first call needs this barrier,
because the order of the other calls is part of the graph.

A gather after a ring, or a ring after a gather, begins with the same barrier, because their slots overlap in memory.

A gather may include the rank's own rows, for a call that needs all keys in one tensor. That copy runs concurrently with
the copies to other ranks.

Memory on each rank: the slots for the largest call so far. A gather has two slots, each for the keys and values
of all other ranks or of all ranks. A ring has three slots, each for one rank's keys and values.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from .copy_plan import CopyPlan, make_copy_plan
from .gathered_rows import OTHERS, GatheredRows
from .group import Group
from .side_stream import Lane

_SLOTS, _SLOTS_OF_A_RING = 2, 3
_ARRIVED, _READ = 0, 1
"""Channels of the barriers: all copies of this call have arrived; all data of earlier calls has been read."""
_PLANS = 64
"""Number of copy plans that are kept."""


class Memory(Protocol):
    """The interface of `symmetric_memory.SymmetricMemory`."""

    buffers: list[Tensor]

    def barrier(self, channel: int) -> None: ...


class _Pending(NamedTuple):
    """A call that has started."""

    call: int
    """Number of the call."""
    slots: int
    """Number of slots that such calls use in turn."""
    received: Tensor
    own_lane: Lane | None
    """The lane of the copy of this rank's own rows, if there is one."""


class SymmetricGather:
    """Gathers over one group, one at a time, in the same order on every rank.

    Args:
        allocate: allocates memory of the given number of bytes on every rank; a collective.
        lane: runs copies to other ranks concurrently with the current stream.
        own_lane: runs copies to this rank concurrently with the current stream.
    """

    def __init__(self, group: Group, allocate: Callable[[int], Memory], lane: Lane, own_lane: Lane) -> None:
        self.group = group
        self._allocate = allocate
        self._lane = lane
        self._own_lane = own_lane
        self._memory: Memory | None = None
        self._nbytes = 0
        self._slots = _SLOTS
        """Number of slots of the latest call."""
        self._retired: list[Memory] = []
        self._plans: dict[object, CopyPlan] = {}
        self._guarded = False
        self._in_one_graph: int | None = None
        """Number of calls so far in the CUDA graph that is being captured; None outside of `in_one_graph`."""
        self._calls = 0
        self._pending: dict[int, _Pending] = {}
        """Calls that have started and not finished, by ticket."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory in which this rank receives."""
        return self._nbytes

    def has_room(self, nbytes: int, most: int) -> bool:
        """Whether gathers whose received data (`GatheredRows.length`) takes `nbytes` need no more memory than there is,
        or than `most`. In a CUDA graph no memory can be added. The same on all ranks."""
        from .symmetric_memory import ALIGNMENT

        needed = _SLOTS * -(-nbytes // ALIGNMENT) * ALIGNMENT
        return needed <= (self._nbytes if self._lane.is_captured() else max(self._nbytes, most))

    @property
    def device(self) -> torch.device:
        """The device of the memory, after `reserve`."""
        memory: Any = self._memory
        return memory.buffers[self.group.rank].device

    def reserve(self, nbytes: int) -> None:
        """Allocates memory for gathers whose received data takes `nbytes`. A collective of all ranks."""
        self._reserve(nbytes, _SLOTS)

    def start(self, tensors: Sequence[Tensor], sizes: Sequence[int], ticket: int = 0, shift: int = OTHERS) -> None:
        """Sends this rank's contiguous `[batch, rows, ...]` tensors. They must not be written to or freed before
        `finish`.

        Args:
            tensors: keys and values; or one tensor, such as both packed, which takes one copy for each rank.
            sizes: number of rows of every rank.
            ticket: identifies the call for `finish`.
            shift: in a ring, the distance to the receiving rank; or OTHERS, or EVERYONE.
        """
        signature = (*[tensor.shape for tensor in tensors], tensors[0].dtype, tensors[0].device, tuple(sizes), shift)
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plans[signature] = self._make_plan(tensors, sizes, shift)
        memory: Any = self._memory
        lane = self._lane
        lane.fork()
        is_captured = lane.is_captured()
        if is_captured:
            self._guarded = True
        if is_captured and self._in_one_graph is not None:
            self._in_one_graph += 1
        slots = len(plan.received)
        is_behind_its_like = is_captured and self._in_one_graph not in (None, 1)
        if slots != self._slots or (self._guarded and not is_behind_its_like):
            memory.barrier(_READ)
        self._slots = slots
        self._calls += 1
        slot = self._calls % slots
        with lane:
            for copy in plan.to_others[slot]:
                copy.make(tensors)
            memory.barrier(_ARRIVED)
        own_lane = self._own_lane if plan.to_itself[slot] else None
        if own_lane is not None:
            own_lane.fork()
            with own_lane:
                for copy in plan.to_itself[slot]:
                    copy.make(tensors)
        self._pending[ticket] = _Pending(self._calls, slots, plan.received[slot], own_lane)

    def finish(self, ticket: int = 0) -> Tensor:
        """Waits for the received data and returns it in the layout of `GatheredRows`. It may be read by work that the
        current stream receives before the next call starts (in a ring, the next but one), and must not be written
        to."""
        pending = self._pending.pop(ticket)
        later = self._calls - pending.call
        if later >= pending.slots:
            raise RuntimeError(
                f"{later} gathers of the same ranks have started since this one and overwrite its data. A compiler "
                "that compiles the full model may reorder attentions that do not depend on each other: compile the "
                "model block by block."
            )
        self._lane.join()
        if pending.own_lane is not None:
            pending.own_lane.join()
        return pending.received

    @contextlib.contextmanager
    def in_one_graph(self) -> Iterator[None]:
        """Context in which all captured calls belong to one CUDA graph, in this order. Calls of a capture that failed
        count as not made."""
        outer, self._in_one_graph = self._in_one_graph, 0
        calls, slots = self._calls, self._slots
        try:
            yield
        except BaseException:
            self._calls, self._slots = calls, slots
            self._pending.clear()
            raise
        finally:
            self._in_one_graph = outer

    def _make_plan(self, tensors: Sequence[Tensor], sizes: Sequence[int], shift: int) -> CopyPlan:
        layouts = [GatheredRows.of(tensors, sizes, rank, shift) for rank in range(self.group.size)]
        slots, dtype = _SLOTS_OF_A_RING if shift > 0 else _SLOTS, tensors[0].dtype
        slot_bytes = self._reserve(max(layout.length for layout in layouts) * dtype.itemsize, slots)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        memory: Any = self._memory
        device = memory.buffers[self.group.rank].device
        if any((tensor.dtype, tensor.device) != (dtype, device) for tensor in tensors):
            raise AttentionProviderError(
                f"keys and values are {' and '.join(f'{each.dtype} on {each.device}' for each in tensors)}; one dtype "
                f"on {device} is accepted, the device that was current when context parallelism was applied. Move the "
                "model to it."
            )
        return make_copy_plan(memory.buffers, slot_bytes, slots, layouts, dtype, sizes, shift, self.group)

    def _reserve(self, nbytes: int, slots: int) -> int:
        """The distance of slots in bytes, in memory for `slots` slots of `nbytes`. All ranks allocate in the same call,
        because every rank has the sizes of all ranks."""
        from .symmetric_memory import ALIGNMENT

        needed = slots * -(-nbytes // ALIGNMENT) * ALIGNMENT
        if needed > self._nbytes:
            if self._lane.is_captured():
                raise AttentionProviderError(
                    f"a CUDA graph captures a call that receives {needed} bytes, and {self._nbytes} bytes are "
                    "allocated. Make the call once before it is captured, on every rank."
                )
            # All data sent to this rank has arrived, because this rank has waited for it. No rank sends more before all
            # ranks have reached this allocation.
            self._lane.drain()
            if self._guarded and self._memory is not None:
                self._retired.append(self._memory)  # graphs still use it
            self._plans.clear()
            self._memory = None
            self._memory = self._allocate(needed)
            self._nbytes = needed
        return self._nbytes // slots // ALIGNMENT * ALIGNMENT


_gathers: weakref.WeakValueDictionary[str, SymmetricGather] = weakref.WeakValueDictionary()
"""Open gathers by the name of their group, because an operator in a compiled graph takes only plain values. The model's
context parallelism owns them."""


def open_gather(group: Group, make: Callable[[], SymmetricGather]) -> SymmetricGather:
    """The open gather of `group`, or a new one from `make`. It stays open as long as it is referenced. Several models
    may share one."""
    gather = _gathers.get(group.name)
    if gather is None:
        gather = _gathers[group.name] = make()
    return gather


def opened_gather(group: str) -> SymmetricGather | None:
    """The gather that is open for the group of this name; None where there is none. The same on all ranks of it."""
    return _gathers.get(group)


def gather_of(group: str) -> SymmetricGather:
    gather = _gathers.get(group)
    if gather is None:
        raise AttentionProviderError(
            f"group '{group}' has no symmetric memory in this process: context parallelism was removed from the model "
            "that makes this call, or the model comes from another process. Call apply_context_parallel."
        )
    return gather
