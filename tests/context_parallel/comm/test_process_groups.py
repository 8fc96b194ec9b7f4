"""The private names of PyTorch that `process_groups.py` uses. A failure names the one that has changed."""

from __future__ import annotations

import datetime
import inspect

import torch.distributed as dist
from torch.distributed import distributed_c10d

from diffusers_attn.context_parallel.comm import process_groups


def test_the_functions_are_there_with_the_arguments_that_are_used():
    for name in ("_resolve_process_group", "_get_default_store", "_set_pg_timeout", "_get_default_timeout"):
        assert callable(getattr(distributed_c10d, name)), name
    parameters = list(inspect.signature(distributed_c10d._new_process_group_helper).parameters)
    assert parameters[:6] == [
        "group_size", "group_rank", "global_ranks_in_group", "backend", "store", "group_name"
    ]  # fmt: skip
    assert {"timeout", "group_desc"} < set(parameters)
    assert hasattr(distributed_c10d._world, "pg_map") and hasattr(distributed_c10d._world, "pg_group_ranks")


def groups(meshes):
    """A group of our own: its order, name, timeout and end."""
    members = [1, 0]
    second = datetime.timedelta(seconds=17)
    group = process_groups.new_gloo_group(members, "of our own", second)
    assert dist.get_process_group_ranks(group) == members
    assert process_groups.resolve("of our own") == group and process_groups.is_alive(group)
    assert process_groups.timeout_of(group, "cpu") == second
    process_groups.set_timeout(group, 2 * second)
    assert process_groups.timeout_of(group, "cpu") == 2 * second
    assert process_groups.default_timeout(group) == datetime.timedelta(minutes=30)
    dist.destroy_process_group(group)
    assert not process_groups.is_alive(group)


def test_a_group_of_our_own(pool):
    pool.run(2, groups)
