"""The process groups that enabling makes: shared, used again, and ended with the last model that uses them."""

from __future__ import annotations

import datetime
import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.comm import process_groups, shared_groups
from diffusers_attn.context_parallel.hooks.apply import applied_tracker
from diffusers_attn.context_parallel.mesh import ContextParallelMesh

from ...parallelize.test_enable import build, inputs, output


def counted():
    """Groups, threads and file descriptors of this process: the fewest within half a second, since threads end a little
    later than what they did, and files are open while they are read."""
    found = []
    for _ in range(10):
        found.append((len(_world.pg_map), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
        time.sleep(0.05)
    return tuple(map(min, *found))


def again_and_again(meshes):
    gc.collect()
    shared_groups.end_unused()  # those of models of earlier tests
    model, other = build("flux"), build("flux")
    expected = output(model, inputs("flux")).detach()
    counts = []
    for turn in range(6):
        degrees = {"ulysses_degree": 2, "ring_degree": 2} if turn % 2 else {}
        enable_context_parallel(model, verbose=False, **degrees)
        disable_context_parallel(model)
        counts.append(counted())
    enable_context_parallel(model, verbose=False)
    alone = counted()
    enable_context_parallel(other, verbose=False)
    assert counted() == alone  # of the same degrees
    assert applied_tracker(model).mesh == applied_tracker(other).mesh
    disable_context_parallel(model)
    now = counted()
    assert now == alone, (now, alone)
    assert torch.allclose(output(other, inputs("flux")), expected)
    # A model that was not disabled: on one rank it goes, on the others it is still there.
    if dist.get_rank() == 1:
        del other
        gc.collect()
        shared_groups.end_unused()
    enable_context_parallel(model, verbose=False)
    assert torch.allclose(output(model, inputs("flux")), expected)
    other = None
    gc.collect()
    disable_context_parallel(model)
    return counts, counted()


def test_nothing_is_left_of_enabling_again_and_again(pool):
    for counts, last in pool.run(4, again_and_again):
        assert counts[1:] == [counts[1]] * (len(counts) - 1), counts
        assert last[0] == counts[1][0] and last[1] <= counts[1][1] and last[2] <= counts[1][2]


def timeouts(meshes):
    """Of the groups that were made, given `timeout`; and of those of a mesh."""
    model = build("flux")
    job = process_groups.timeout_of(None, "cpu")
    found = []
    for timeout in (None, 40, datetime.timedelta(seconds=50)):
        enable_context_parallel(model, ulysses_degree=2, ring_degree=2, timeout=timeout, verbose=False)
        mesh = applied_tracker(model).mesh
        made = [group for each in shared_groups._all for group in each.groups]
        assert {mesh.ring.name, mesh.ulysses.name} < {group.group_name for group in made} and len(made) == 3
        found.append({process_groups.timeout_of(group, "cpu") for group in made})
        disable_context_parallel(model)
    assert found == [{job}, {datetime.timedelta(seconds=40)}, {datetime.timedelta(seconds=50)}]
    of_degrees = ContextParallelMesh.from_degrees(2, 2, device_type="cpu", timeout=70)
    assert process_groups.timeout_of(process_groups.resolve(of_degrees.ring.name), "cpu").total_seconds() == 70
    del of_degrees
    shared_groups.end_unused()
    enable_context_parallel(model, mesh=meshes.square, verbose=False)
    of_mesh = {process_groups.timeout_of(meshes.square.get_group(dim), "cpu") for dim in (0, 1)}
    disable_context_parallel(model)
    assert of_mesh == {job}  # and not PyTorch's half an hour
    for wrong in (0, -1, "8", True, datetime.timedelta(0), float("nan")):
        with pytest.raises(AttentionProviderError, match="timeout=.*number of seconds above 0"):
            enable_context_parallel(model, timeout=wrong, verbose=False)


def test_every_group_waits_as_long_as_was_said(pool):
    pool.run(4, timeouts)


def names_again(meshes):
    """Groups of some ranks only, made and destroyed, on ranks that have different numbers of other groups."""
    members = [1, 0]
    if dist.get_rank() == 0:
        group_of_one = process_groups.new_gloo_group([0], "alone", datetime.timedelta(seconds=20))
    for _ in range(3):
        lease = shared_groups.control_group(
            members,
            datetime.timedelta(seconds=20),
            lambda value: [each for each in _exchanged(meshes, value)],
        )
        tensor = torch.tensor([float(dist.get_rank())])
        dist.broadcast(tensor, members[0], group=process_groups.resolve(lease.names[0]))
        assert tensor.item() == 1.0
        lease.close()
        shared_groups.end_unused()
    if dist.get_rank() == 0:
        dist.destroy_process_group(group_of_one)


def _exchanged(meshes, value):
    from diffusers_attn.context_parallel.comm.everyone import everyone

    return everyone(value, [meshes.lines[2].get_group()])


def test_a_group_of_the_same_ranks_is_a_new_one_each_time(pool):
    pool.run(2, names_again)
