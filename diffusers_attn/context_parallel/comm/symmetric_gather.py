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

Memory on each rank: the slots for the largest call so far. A gather has two slots for the keys and values of all other
ranks, or of all ranks. A ring has three slots for those of one rank.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ...recompute import in_backward_id
from ..compile.inductor import prepare_for_exchanges
from . import one_thread
from .collectives import depends_on
from .group import Group

OTHERS, EVERYONE = 0, -1
"""Targets of a gather, in place of the shift of a ring: all other ranks, or all ranks including this one."""
_SLOTS, _SLOTS_OF_A_RING = 2, 3
_ARRIVED, _READ = 0, 1
"""Channels of the barriers: all copies of this call have arrived; all data of earlier calls has been read."""
_PLANS = 64
_ODD = 61
"""Unused elements at the end of the received tensor; see `GatheredKV`."""
_ALIGN = 128
"""The value begins at a multiple of this many elements."""


class Memory(Protocol):
    """The interface of `symmetric_memory.SymmetricMemory`."""

    buffers: list[Tensor]

    def barrier(self, channel: int) -> None: ...


class Lane(Protocol):
    """The interface of `SideStream`."""

    def is_captured(self) -> bool: ...
    def fork(self) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> None: ...
    def join(self) -> None: ...
    def drain(self) -> None: ...


class GatheredKV(NamedTuple):
    """The layout of received keys and values in a flat tensor.

    A compiled graph treats this tensor as its own and might reuse its memory after the last read. In practice it does
    not: a compiler reuses memory for a tensor of about the same size, and no other tensor has the size of this one.
    """

    batch: int
    rows: int
    key_tail: tuple[int, ...]
    """Heads and head_dim of the key."""
    value_tail: tuple[int, ...]

    @staticmethod
    def of(key: Tensor, value: Tensor, sizes: Sequence[int], rank: int, shift: int = OTHERS) -> GatheredKV:
        """The layout on `rank`, from any rank's `[batch, rows, heads, head_dim]` and the number of rows of every rank.
        `shift` selects the rows of the rank that is `shift` before, of all other ranks, or of all ranks."""
        rows = sizes[(rank - shift) % len(sizes)] if shift > 0 else sum(sizes)
        rows -= sizes[rank] if shift == OTHERS else 0
        return GatheredKV(key.shape[0], rows, tuple(key.shape[2:]), tuple(value.shape[2:]))

    @property
    def key_elements(self) -> int:
        return self.batch * self.rows * self.key_tail[0] * self.key_tail[1]

    @property
    def value_elements(self) -> int:
        return self.batch * self.rows * self.value_tail[0] * self.value_tail[1]

    @property
    def value_start(self) -> int:
        return -(-self.key_elements // _ALIGN) * _ALIGN

    @property
    def length(self) -> int:
        return self.value_start + self.value_elements + _ODD

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value, `[batch, rows, heads, head_dim]`, rows in the order of the ranks."""
        key = flat[: self.key_elements].view(self.batch, self.rows, *self.key_tail)
        value = flat[self.value_start : self.value_start + self.value_elements]
        return key, value.view(self.batch, self.rows, *self.value_tail)


class _Copy(NamedTuple):
    is_value: bool
    sample: int | None
    """Index of the sample to copy; None copies the full batch, if it is contiguous in the target."""
    target: Tensor

    def make(self, key: Tensor, value: Tensor) -> None:
        source = value if self.is_value else key
        self.target.copy_(source if self.sample is None else source[self.sample : self.sample + 1])


class _CopyPlan(NamedTuple):
    """For each slot, the copies to other ranks and to this rank, and the received tensor, for one kind of call."""

    to_others: list[list[_Copy]]
    to_itself: list[list[_Copy]]
    received: list[Tensor]


class _Coming(NamedTuple):
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
        self._plans: dict[object, _CopyPlan] = {}
        self._guarded = False
        self._in_one_graph: int | None = None
        """Number of calls so far in the CUDA graph that is being captured; None outside of `in_one_graph`."""
        self._calls = 0
        self._coming: dict[int, _Coming] = {}
        """Calls that have started and not finished, by ticket."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory in which this rank receives."""
        return self._nbytes

    def has_room(self, nbytes: int, most: int) -> bool:
        """Whether gathers that bring so many bytes need no more memory than there is, or than `most`. The same on all
        ranks."""
        from .symmetric_memory import ALIGNMENT

        needed = _SLOTS * (-(-nbytes // ALIGNMENT) + 1) * ALIGNMENT
        return needed <= (self._nbytes if self._lane.is_captured() else max(self._nbytes, most))

    def start(self, key: Tensor, value: Tensor, sizes: Sequence[int], ticket: int = 0, shift: int = OTHERS) -> None:
        """Sends this rank's contiguous `[batch, rows, heads, head_dim]` tensors. They must not be written to or freed
        before `finish`.

        Args:
            sizes: number of rows of every rank.
            ticket: identifies the call for `finish`.
            shift: in a ring, the distance to the receiving rank; or OTHERS, or EVERYONE.
        """
        signature = (key.shape, value.shape, key.dtype, key.device, tuple(sizes), shift)
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plans[signature] = self._make_plan(key, value, sizes, shift)
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
                copy.make(key, value)
            memory.barrier(_ARRIVED)
        own_lane = self._own_lane if plan.to_itself[slot] else None
        if own_lane is not None:
            own_lane.fork()
            with own_lane:
                for copy in plan.to_itself[slot]:
                    copy.make(key, value)
        self._coming[ticket] = _Coming(self._calls, slots, plan.received[slot], own_lane)

    def finish(self, ticket: int = 0) -> Tensor:
        """Waits for the received data and returns it in the layout of `GatheredKV`. It may be read by work that the
        current stream receives before the next call starts (in a ring, the next but one), and must not be written
        to."""
        coming = self._coming.pop(ticket)
        later = self._calls - coming.call
        if later >= coming.slots:
            raise RuntimeError(
                f"{later} gathers of the same ranks have started since this one and overwrite its data. A compiler "
                "that compiles the full model may reorder attentions that do not depend on each other: compile the "
                "model block by block."
            )
        self._lane.join()
        if coming.own_lane is not None:
            coming.own_lane.join()
        return coming.received

    @contextlib.contextmanager
    def in_one_graph(self) -> Iterator[None]:
        """Context in which all captured calls belong to one CUDA graph, in this order."""
        outer, self._in_one_graph = self._in_one_graph, 0
        try:
            yield
        finally:
            self._in_one_graph = outer

    def _make_plan(self, key: Tensor, value: Tensor, sizes: Sequence[int], shift: int) -> _CopyPlan:
        layouts = [GatheredKV.of(key, value, sizes, rank, shift) for rank in range(self.group.size)]
        itemsize = key.dtype.itemsize
        count = _SLOTS_OF_A_RING if shift > 0 else _SLOTS
        slot_bytes = self._reserve(max(layout.length for layout in layouts) * itemsize, count)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        memory: Any = self._memory
        if memory.buffers[self.group.rank].device != key.device or value.dtype != key.dtype:
            raise AttentionProviderError(
                f"keys are {key.dtype} on {key.device} and values {value.dtype} on {value.device}; one dtype on "
                f"{memory.buffers[self.group.rank].device} is accepted, the device that was current when context "
                "parallelism was applied. Move the model to it."
            )
        # Each rank begins with the next rank, so that no rank is the first target of all.
        steps = [shift] if shift > 0 else range(1, self.group.size)
        others = [(self.group.rank + step) % self.group.size for step in steps]
        itself = [self.group.rank] if shift == EVERYONE else []
        with torch.inference_mode(False):
            slots = [
                [
                    buffer[slot * slot_bytes :][: layout.length * itemsize].view(key.dtype)
                    for buffer, layout in zip(memory.buffers, layouts)
                ]
                for slot in range(count)
            ]
            to_others, to_itself = (
                [
                    [copy for rank in ranks for copy in self._copies(slot[rank], layouts[rank], sizes, rank, shift)]
                    for slot in slots
                ]
                for ranks in (others, itself)
            )
        return _CopyPlan(to_others, to_itself, [slot[self.group.rank] for slot in slots])

    def _copies(self, flat: Tensor, layout: GatheredKV, sizes: Sequence[int], receiver: int, shift: int) -> list[_Copy]:
        """This rank's rows at `receiver`, in pieces that are contiguous there."""
        rank, rows = self.group.rank, sizes[self.group.rank]
        if rows == 0:
            return []
        ranks_before = [] if shift > 0 else [other for other in range(rank) if shift == EVERYONE or other != receiver]
        start = sum(sizes[other] for other in ranks_before)
        found = []
        for is_value, there in enumerate(layout.views(flat)):
            target = there.narrow(1, start, rows)
            whole = layout.batch == 1 or rows == layout.rows
            pieces = [(None, target)] if whole else [(n, target[n : n + 1]) for n in range(layout.batch)]
            found += [_Copy(bool(is_value), sample, piece) for sample, piece in pieces]
        return found

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


class SideStream:
    """A stream beside the current one. Work inside `with` runs after the earlier work of the current stream,
    concurrently with its work until `join`, and before its work after `join`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # High priority, before kernels of the main stream: a barrier is one warp.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._context = torch.cuda.stream(self._stream)
        self._begin, self._end = torch.cuda.Event(), torch.cuda.Event()
        self._main: torch.cuda.Stream | None = None

    def is_captured(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def fork(self) -> None:
        main = torch.cuda.current_stream(self._device)
        # None is tested first, because a stream compares equal to None.
        if self._main is None:
            self._main = main
        elif main != self._main:
            # Work of the earlier stream still reads received data. (A capture has waited for all of it.)
            if not self.is_captured():
                main.wait_stream(self._main)
            self._main = main

    def __enter__(self) -> None:
        assert self._main is not None
        self._begin.record(self._main)
        self._stream.wait_event(self._begin)
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.record(self._stream)
        self._context.__exit__(kind, error, traceback)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)


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


# Two operators for compiled graphs, so that attention to the local keys can run between them. They declare that they
# change their arguments, although they do not. So readers of these tensors keep their order relative to the operators,
# and the memory that is sent stays allocated until the copies are made. (A compiler may give each operator its own copy
# of a tensor that is only read.) The ticket pairs a start with its finish, and keeps two calls with equal data apart.
_library = torch.library.Library("diffusers_attn", "FRAGMENT")
_library.define("symmetric_gather_start(Tensor(a!)[] held, SymInt[] sizes, str group, int ticket, int shift) -> ()")
_library.define(
    "symmetric_gather_finish(Tensor(a!)[] held, Tensor[] meanwhile, SymInt length, str group, int ticket) -> Tensor"
)


def _start(held: list[Tensor], sizes: Sequence[int], group: str, ticket: int, shift: int) -> None:
    gather_of(group).start(held[0], held[1], sizes, ticket, shift)


def _finish(held: list[Tensor], meanwhile: list[Tensor], length: int, group: str, ticket: int) -> Tensor:
    return gather_of(group).finish(ticket)


_library.impl("symmetric_gather_start", _start, "CompositeExplicitAutograd")
_library.impl("symmetric_gather_finish", _finish, "CompositeExplicitAutograd")


@torch.library.register_fake("diffusers_attn::symmetric_gather_start", lib=_library)
def _(held, sizes, group, ticket, shift):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("diffusers_attn::symmetric_gather_finish", lib=_library)
def _(held, meanwhile, length, group, ticket):  # type: ignore[no-untyped-def]
    return held[0].new_empty(length)


_tickets = itertools.count(1)


@torch._dynamo.assume_constant_result
def _new_ticket() -> int:
    return next(_tickets)


class GatherInFlight(NamedTuple):
    """Key and value on their way to the other ranks of a group."""

    held: list[Tensor]
    """Key and value, which computation before `finish` must use in place of the originals; and the query."""
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
        """Sends `key` and `value`, `[batch, rows, heads, head_dim]` and contiguous, to other ranks of `group`.

        Args:
            query: the query that attends to them.
            sizes: number of rows of every rank.
            needs_grad: whether key and value may be saved for a backward.
            shift: distance to the receiving rank; or OTHERS, or EVERYONE.
        """
        held = [key, value, query]
        if needs_grad and torch.compiler.is_compiling():
            # Saved tensors must not be declared changed. So copies are sent; they depend on the query, as `held` does.
            held = [depends_on(key, query, sent_over=group), depends_on(value, query)]
        return GatherInFlight(held, sizes, group)._begun(shift)

    def again(self, shift: int) -> GatherInFlight:
        """Sends the same to another rank."""
        return self._begun(shift)

    def _begun(self, shift: int) -> GatherInFlight:
        if not torch.compiler.is_compiling():
            if in_backward_id() != -1:
                one_thread.take_in_backward(self.group.name)
            gather_of(self.group.name).start(self.held[0], self.held[1], self.sizes, shift=shift)
            return self._replace(shift=shift)
        prepare_for_exchanges()
        ticket = _new_ticket()
        # The overload declares the mutation, so that the compiler does not remove the call.
        torch.ops.diffusers_attn.symmetric_gather_start.default(self.held, self.sizes, self.group.name, ticket, shift)
        return self._replace(shift=shift, ticket=ticket)

    def finish(self, meanwhile: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of the rank that is `shift` before, of all other ranks, or of all ranks, in their order. They
        may be read until the next call starts (in a ring, the next but one).

        Args:
            meanwhile: a result that was computed since the start.
        """
        received = GatheredKV.of(self.held[0], self.held[1], self.sizes, self.group.rank, self.shift)
        if torch.compiler.is_compiling():
            finish = torch.ops.diffusers_attn.symmetric_gather_finish.default
            flat = finish(self.held, [meanwhile], received.length, self.group.name, self.ticket)
        else:
            flat = gather_of(self.group.name).finish(self.ticket)
        return received.views(flat)
