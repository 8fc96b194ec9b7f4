"""Times one device and its links: matrix products, copies in its memory, and messages to other ranks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.comm import symmetric_memory
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.group import Group
from ..providers.hardware import Link


class Sizes(NamedTuple):
    """Sizes of the measurements on one type of device: a few milliseconds in all."""

    matrix: int
    """Rows and columns of the matrices to multiply."""
    dtype: torch.dtype
    free: int
    """Bytes of a GPU's memory that must be free: for these tensors, and for NCCL's buffers while it measures."""
    memory: int
    """Bytes to copy within the device's memory."""
    small: int
    """Bytes of a message whose time is all latency."""
    large: int
    """Bytes of a message whose time is mostly transfer."""
    repeats: int


SIZES = {
    "cuda": Sizes(4096, torch.bfloat16, 2**31, 2**26, 2**12, 2**24, 10),
    "cpu": Sizes(256, torch.float32, 0, 2**22, 2**12, 2**20, 3),
}


class Bench:
    """Times work on one device."""

    def __init__(self, sizes: Sizes, device_type: str) -> None:
        self.sizes = sizes
        self.on_gpu = device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device(device_type)
        self.multiprocessors = 1
        if self.on_gpu:
            self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            free, _ = torch.cuda.mem_get_info(device)
            if free < sizes.free:  # NCCL may fail on one rank, for which the others would wait
                raise MemoryError(f"{free / 2**20:.0f} MiB of {device} are free, {sizes.free / 2**20:.0f} are needed")
        self.matrix = torch.ones(sizes.matrix, sizes.matrix, dtype=sizes.dtype, device=device)
        self.product = torch.empty_like(self.matrix)
        self.bytes = torch.zeros(max(sizes.memory, sizes.large), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.bytes)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one `run`."""
        run()
        if not self.on_gpu:
            times = []
            for _ in range(self.sizes.repeats):
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            return min(times)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.sizes.repeats):  # while the GPU multiplies, the host launches everything that is timed
            self._multiply()
        run()  # an exchange waits here for the slowest rank
        begin_event.record()
        for _ in range(self.sizes.repeats):
            run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / self.sizes.repeats

    def _multiply(self) -> None:
        torch.matmul(self.matrix, self.matrix, out=self.product)

    def matrix_flops(self) -> float:
        with torch.no_grad():
            return 2 * self.sizes.matrix**3 / self.seconds(self._multiply)

    def memory_bytes_per_second(self) -> float:
        part = slice(self.sizes.memory)
        return 2 * self.sizes.memory / self.seconds(lambda: self.target[part].copy_(self.bytes[part]))

    def link(self, send: Callable[[int], object]) -> Link:
        """The link over which `send(n)` sends `n` bytes out of this rank."""
        small, large = self.sizes.small, self.sizes.large
        of_small, of_large = (self.seconds(functools.partial(send, nbytes)) for nbytes in (small, large))
        transfer = of_large - of_small
        return Link(of_small, (large - small) / transfer if transfer > 0 else large / of_large)


def exchange(bench: Bench, group: Any, per_node: int, *, between: bool) -> Callable[[int], object]:
    """Sends equal parts to all other ranks of the node; or to the ranks with the same place in all other nodes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    node, place = divmod(rank, per_node)
    peers = [
        other
        for other in range(world)
        if other != rank and (other % per_node == place if between else other // per_node == node)
    ]

    def send(nbytes: int) -> None:
        part = nbytes // len(peers)
        splits = [part if other in peers else 0 for other in range(world)]
        total = part * len(peers)
        dist.all_to_all_single(bench.target[:total], bench.bytes[:total], splits, splits, group=group)

    return send


class _Memory(Protocol):
    """The interface of `SymmetricMemory`."""

    buffers: list[Tensor]

    def barrier(self, channel: int) -> None: ...


def copies_between(bench: Bench, group: Any, world: int) -> Link | None:
    """The link of copies into the next rank's memory; None if the ranks cannot share memory. As
    `comm.transport.choose_transport`, which decides whether attention uses such copies."""
    memory: _Memory | None = None
    problem: str | None = symmetric_memory.missing_interface()
    if not any(everyone(problem, [None])):
        try:
            own = Group(group.group_name, dist.get_rank(), world)
            memory = symmetric_memory.SymmetricMemory(own, bench.sizes.large, bench.bytes.device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    if any(everyone(problem, [None])) or memory is None:
        return None
    return measure_copies(bench, memory, dist.get_rank(), world)


def measure_copies(bench: Bench, memory: _Memory, rank: int, world: int) -> Link:
    """The link of copies into the memory of the next rank, while all ranks copy."""
    target = memory.buffers[(rank + 1) % world]
    memory.barrier(0)
    found = bench.link(lambda nbytes: target[:nbytes].copy_(bench.bytes[:nbytes]))
    memory.barrier(0)
    return found
