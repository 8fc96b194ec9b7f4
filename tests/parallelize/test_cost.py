"""What a forward with the default `inputs="broadcast"` exchanges and waits for, and what enabling does."""

from __future__ import annotations

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn import disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.comm.gather_rows import first_ranks_rows, gather_rows
from diffusers_attn.context_parallel.comm.symmetric_gather import gather_of
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, split

from ..context_parallel.shared_memory import NoLane, open_shared
from .test_enable import build, inputs, output


class Operations(TorchDispatchMode):
    """Counts collectives, and reads of a tensor's value, for which a host waits for its device."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default")
        if "c10d" in name or "_local_scalar_dense" in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def repeated(meshes):
    """Operations of enabling, and those of a second forward beyond inputs="trust"."""
    given, counts = inputs("flux"), {}
    for mode in ("trust", "broadcast"):
        model = build("flux")
        with Operations() as enabling:
            enable_context_parallel(model, mesh=meshes.lines[2], inputs=mode, verbose=False)
        output(model, given)
        with Operations() as forward:
            output(model, given)
        disable_context_parallel(model)
        counts[mode] = forward.counts
    return [name for name in enabling.counts if "c10d" in name], dict(counts["broadcast"] - counts["trust"])


def test_a_repeated_forward_reads_no_tensor_and_makes_two_exchanges(pool):
    for enabling, forward in pool.run(2, repeated):
        # A collective of tensors on GPUs would have NCCL make a communicator.
        assert set(enabling) <= {"c10d.barrier"}, enabling
        assert set(forward) <= {"c10d.allgather_", "c10d.broadcast_"}, forward
        assert sum(forward.values()) <= 2, forward


def by_memory(meshes):
    """Whether rows that go through shared memory are those of collectives, and the collectives that were made."""
    mesh = meshes(3, 1)
    group, shards = mesh.ring, Shards.contiguous(7, 3)
    full = torch.arange(14.0).view(7, 2)
    mine = split(full, shards, 0, mesh.rank)
    by_collective = gather(mine, shards, 0, mesh), first_ranks_rows(full * (1 + mesh.rank), 7, group)
    lane = NoLane()
    memory = open_shared(group, lane)
    gather_rows(mine, shards.sizes, group)  # takes the memory
    with Operations() as operations:
        for turn in range(3):
            lane.captured = turn > 0  # a CUDA graph holds what ran before: NCCL cannot make a communicator in it
            own = full * (1 + mesh.rank)
            found = gather(mine, shards, 0, mesh), first_ranks_rows(own, 7, group)
            assert (found[1] is own) == (mesh.rank == 0)  # the first rank copies nothing to itself
            more = gather_rows(mine.to(torch.uint8) + turn, shards.sizes, group)
            assert more.tolist() == (full.to(torch.uint8) + turn).tolist()
    lane.captured = False
    right = all(torch.equal(one, full) and torch.equal(one, other) for one, other in zip(found, by_collective))
    leaf = mine.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((gather(leaf, shards, 0, mesh) * full).sum(), leaf)
    right = right and torch.equal(gradient, 3 * mine)
    assert gather_of(group.name) is memory
    # More than attention has taken, and than is taken for rows, goes by a collective.
    size = memory.nbytes
    large = torch.zeros(2**25 if mesh.rank == 0 else 0, dtype=torch.uint8)
    right = right and gather_rows(large, (2**25, 0, 0), group).shape == (2**25,) and memory.nbytes == size
    return right, dict(operations.counts)


def test_rows_go_through_the_memory_that_a_group_shares(pool):
    for right, operations in pool.run(3, by_memory):
        assert right
        assert set(operations) == {"c10d.barrier"}  # of the memory
