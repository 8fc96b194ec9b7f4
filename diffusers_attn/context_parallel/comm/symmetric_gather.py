"""Keys and values sent by copy engines: every rank writes them straight into the memory of the others, of all at once
for a gather, or of one in each step of a ring.

    this stream:   ... key, value | attention to the local keys        | attention to the others' ...
    beside it:                    | copies to every other rank, barrier |

The copies take no multiprocessor, and there is none at the receiver: attention reads what has arrived where it has
arrived. Only in the order of the ranks is anything known of other ranks' progress, from one barrier a call, which comes
after the copies. That suffices, for each rank has several slots to receive in and calls take turns in them:

    A rank comes to the barrier of call n (on its side stream) only after all that its stream had been given before call
    n. In a gather that is its attention of call n-1. A rank begins with the copies of call n+1 only after it has passed
    the barrier of call n. So when these copies arrive, every rank is done with its attention of call n-1, which was the
    last to read the slot that call n+1 writes, if there are two.

    In a ring, call n starts before the attention to what call n-1 has brought, to be under way beside it. All is one
    call later, and there are three slots.

A CUDA graph repeats its calls with the slots that they were captured with, however often and between whatever others.
So calls that are captured, and all after them, begin with one more barrier, on the stream itself and before the local
attention: after it every rank is done with all that it had received. Of calls that are known to be in one graph
(`in_one_graph`) only the first does: the others have their predecessors in the graph with them.

Where gathers follow a ring or a ring gathers, whose slots are other places in the same memory, there is one such
barrier, too.

A gather may bring what a rank has itself, too, for a call that is to have all keys in one piece. That copy goes on
beside those to the others.

Memory, on each rank: the slots of what the largest call so far brings; in a gather two of the keys and values of all
other ranks, or of all, in a ring three of those of one.
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
from ..compile.inductor import prepare_for_exchanges
from .collectives import depends_on
from .group import Group

OTHERS, EVERYONE = 0, -1
"""where a gather sends to, in the place of a ring's shift: to all other ranks, or to these and itself."""
_SLOTS, _SLOTS_OF_A_RING = 2, 3
_ARRIVED, _READ = 0, 1
"""channels of the barriers: all copies of this call have arrived; all that earlier calls brought has been read."""
_PLANS = 64
_ODD = 61
"""elements that nobody uses at the end of what is received; see `GatheredKV`."""
_ALIGN = 128
"""elements after which a value may begin."""


class Memory(Protocol):
    """What `symmetric.SymmetricMemory` is."""

    buffers: list[Tensor]

    def barrier(self, channel: int) -> None: ...


class Lane(Protocol):
    """What `SideStream` is."""

    def is_captured(self) -> bool: ...
    def fork(self) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> None: ...
    def join(self) -> None: ...
    def drain(self) -> None: ...


class GatheredKV(NamedTuple):
    """Where keys and values of other ranks lie, in a flat tensor.

    A compiled graph sees this tensor as one of its own, which it may write to once it is read. It never does: a
    compiler reuses memory for something of the same size, or almost, and keys and values are much smaller than the
    whole, whose size nothing else has.
    """

    batch: int
    rows: int
    key_tail: tuple[int, ...]
    """heads and head_dim."""
    value_tail: tuple[int, ...]

    @staticmethod
    def of(key: Tensor, value: Tensor, sizes: Sequence[int], rank: int, shift: int = OTHERS) -> GatheredKV:
        """On `rank`, where ranks have `sizes` rows, from any rank's `[batch, rows, heads, head_dim]`; of the rank that
        is `shift` before, of all others, or of all."""
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
    """which one; None for the whole batch, where it is one piece."""
    target: Tensor

    def make(self, key: Tensor, value: Tensor) -> None:
        source = value if self.is_value else key
        self.target.copy_(source if self.sample is None else source[self.sample : self.sample + 1])


class _CopyPlan(NamedTuple):
    """For each slot, what a kind of call copies to other ranks, and to its own, and the tensor that it receives."""

    to_others: list[list[_Copy]]
    to_itself: list[list[_Copy]]
    received: list[Tensor]


class _Coming(NamedTuple):
    """A call that was started."""

    call: int
    """its number."""
    slots: int
    """between which such calls take turns."""
    received: Tensor
    own_lane: Lane | None
    """where a copy of this rank's own is under way."""


class SymmetricGather:
    """Gathers over one group, one at a time, in the same order on every rank.

    Args:
        allocate: memory of so many bytes on every rank; a collective.
        lane: where copies to other ranks go on beside the work of the current stream.
        own_lane: the same for what stays on this rank.
    """

    def __init__(self, group: Group, allocate: Callable[[int], Memory], lane: Lane, own_lane: Lane) -> None:
        self.group = group
        self._allocate = allocate
        self._lane = lane
        self._own_lane = own_lane
        self._memory: Memory | None = None
        self._nbytes = 0
        self._slots = _SLOTS
        """of the latest call."""
        self._retired: list[Memory] = []
        self._plans: dict[object, _CopyPlan] = {}
        self._guarded = False
        self._in_one_graph: int | None = None
        """while a graph is captured and it is known that this is one: how many of its calls there were."""
        self._calls = 0
        self._coming: dict[int, _Coming] = {}
        """what was started and is not finished, by ticket."""

    @property
    def nbytes(self) -> int:
        """Memory that this rank receives in."""
        return self._nbytes

    def has_room(self, nbytes: int, most: int) -> bool:
        """Whether gathers that bring so many bytes need no more memory than there is, or than `most`. The same on all
        ranks."""
        from .symmetric_memory import ALIGNMENT

        needed = _SLOTS * (-(-nbytes // ALIGNMENT) + 1) * ALIGNMENT
        return needed <= (self._nbytes if self._lane.is_captured() else max(self._nbytes, most))

    def start(self, key: Tensor, value: Tensor, sizes: Sequence[int], ticket: int = 0, shift: int = OTHERS) -> None:
        """Sends this rank's `[batch, rows, heads, head_dim]`, contiguous, to others. They may not be written to, or
        freed, before `finish`.

        Args:
            sizes: rows of every rank.
            ticket: for `finish`.
            shift: to the rank that is so many further, in a ring; or OTHERS, or EVERYONE.
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
        """What the others have sent, once it has arrived, as `GatheredKV` describes it. It is to be read by what is
        given to the current stream before the next call starts, or in a ring the next but one, and not to be written
        to."""
        coming = self._coming.pop(ticket)
        later = self._calls - coming.call
        if later >= coming.slots:
            raise RuntimeError(
                f"{later} gathers of the same ranks have started since this one, which overwrite it. A "
                "compiler that is given the whole model may move attentions that do not depend on each other: compile "
                "the model block by block."
            )
        self._lane.join()
        if coming.own_lane is not None:
            coming.own_lane.join()
        return coming.received

    @contextlib.contextmanager
    def in_one_graph(self) -> Iterator[None]:
        """Calls that are captured within are all in the same CUDA graph, and in this order."""
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
                f"keys of {key.dtype} on {key.device} and values of {value.dtype} on {value.device} are to be sent "
                f"from {memory.buffers[self.group.rank].device}: give both one dtype, and the model the device that "
                "was current when context parallelism was applied."
            )
        # The next rank's first, so that no rank is everybody's first.
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
        """How far slots are apart, in memory for `slots` of `nbytes`. All ranks come to it in the same call, for all
        know the sizes of all."""
        from .symmetric_memory import ALIGNMENT

        needed = slots * -(-nbytes // ALIGNMENT) * ALIGNMENT
        if needed > self._nbytes:
            if self._lane.is_captured():
                raise AttentionProviderError(
                    f"a CUDA graph is captured of a call that is larger than all before ({needed} bytes to receive in, "
                    f"{self._nbytes} are there). Make the call once before it is captured, on every rank."
                )
            # All that others have sent here has arrived, since this rank has waited for it; nobody sends more before
            # all have come here.
            self._lane.drain()
            if self._guarded and self._memory is not None:
                self._retired.append(self._memory)  # graphs still use it
            self._plans.clear()
            self._memory = None
            self._memory = self._allocate(needed)
            self._nbytes = needed
        return self._nbytes // slots // ALIGNMENT * ALIGNMENT


class SideStream:
    """A stream beside whichever is current. What is given to it inside `with` runs after what the current stream had
    been given before, beside what that is given until `join`, and before what comes after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before kernels of the other stream: a barrier is one warp.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._context = torch.cuda.stream(self._stream)
        self._begin, self._end = torch.cuda.Event(), torch.cuda.Event()
        self._main: torch.cuda.Stream | None = None

    def is_captured(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def fork(self) -> None:
        main = torch.cuda.current_stream(self._device)
        # In this order: a stream says of None that it is not unequal to it.
        if self._main is None:
            self._main = main
        elif main != self._main:
            # What was received is read by what the earlier stream was given; a capture has waited for all of it.
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
"""by the name of their group, as PyTorch knows groups: an operator in a compiled graph is given nothing but plain
values. What applies context parallelism owns them."""


def open_gather(group: Group, make: Callable[[], SymmetricGather]) -> SymmetricGather:
    """The gather of `group`: the one that is open, or else what `make` makes. It is open as long as somebody holds it.
    Several models may share one."""
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
            "whose call this is, or the model was brought here from another process. Call apply_context_parallel."
        )
    return gather


# Two operators for compiled graphs, so that attention to the local keys can be between them. They change none of the
# tensors that they are given, and claim to change all: what reads these before, between and after an operator must run
# before, between and after it, and the memory that is sent from is the same, and alive, until the copies are made. (Of
# a tensor that is only read, a compiler may give each operator a copy of its own.) The ticket says which operators
# belong together, and that two calls that send the same are two.
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
    """key and value, to be used in their place by all that is computed meanwhile; and the query."""
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
            query: what attends to them.
            sizes: rows of every rank.
            needs_grad: whether they may be saved for a backward.
            shift: to the rank that is so many further; or OTHERS, or EVERYONE.
        """
        held = [key, value, query]
        if needs_grad and torch.compiler.is_compiling():
            # What is saved must not seem to change: copies, which come after the query, as it would see to itself.
            held = [depends_on(key, query), depends_on(value, query)]
        return GatherInFlight(held, sizes, group)._begun(shift)

    def again(self, shift: int) -> GatherInFlight:
        """Sends the same to another rank."""
        return self._begun(shift)

    def _begun(self, shift: int) -> GatherInFlight:
        if not torch.compiler.is_compiling():
            gather_of(self.group.name).start(self.held[0], self.held[1], self.sizes, shift=shift)
            return self._replace(shift=shift)
        prepare_for_exchanges()
        ticket = _new_ticket()
        # The overload, since of that the compiler knows that it changes an argument, and so must not be left out.
        torch.ops.diffusers_attn.symmetric_gather_start.default(self.held, self.sizes, self.group.name, ticket, shift)
        return self._replace(shift=shift, ticket=ticket)

    def finish(self, meanwhile: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of the rank that is `shift` before, or of all others, or of all, in their order. They may be
        read until the next call starts, or in a ring the next but one.

        Args:
            meanwhile: a result of what was computed since the start.
        """
        received = GatheredKV.of(self.held[0], self.held[1], self.sizes, self.group.rank, self.shift)
        if torch.compiler.is_compiling():
            finish = torch.ops.diffusers_attn.symmetric_gather_finish.default
            flat = finish(self.held, [meanwhile], received.length, self.group.name, self.ticket)
        else:
            flat = gather_of(self.group.name).finish(self.ticket)
        return received.views(flat)
