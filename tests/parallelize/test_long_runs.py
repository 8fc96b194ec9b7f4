"""Long runs on two ranks leave nothing behind: no memory, descriptors, threads, process groups, compiled graphs, and no
keys in the job's store. A server that takes another strategy for each request is such a run, and so are requests that
fail."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _world

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    disable_context_parallel,
    enable_context_parallel,
)

from .test_enable import build, error, inputs, output


class Held(NamedTuple):
    """What this process holds."""

    descriptors: int
    threads: int
    groups: int
    keys: int
    """Keys in the job's store."""
    bytes: int
    """Resident memory."""


MOST = Held(descriptors=2, threads=2, groups=0, keys=8, bytes=24 * 2**20)
"""The most that may be added after the first part of a run, however long it is."""
KEYS_OF_A_GROUP = 40
"""PyTorch leaves the addresses of a group's ranks in the store, and this library the last two meetings."""


def held() -> Held:
    gc.collect()
    process = psutil.Process()
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = len(list(Path("/proc/self/task").iterdir()))
    return Held(descriptors, threads, len(_world.pg_map), _get_default_store().num_keys(), process.memory_info().rss)


def grown(work: Callable[[int], None], first: int, times: int) -> Held:
    """What is added by `times` times of work, after `first` times that are not measured."""
    for number in range(first):
        work(number)
    before = held()
    for number in range(times):
        work(number)
    return Held(*(after - each for after, each in zip(held(), before)))


def strategies(meshes: Any) -> list[dict[str, Any]]:
    return [
        {"mesh": meshes.heads[2]},
        {"mesh": meshes.lines[2], "rotate_method": "alltoall", "inputs": "check"},
        {"mesh": meshes.lines[2], "rotate_method": "allgather", "provider": "_native_math"},
    ]


@torch.no_grad()
def serve(meshes: Any, first: int, times: int) -> Held:
    """Requests one after the other, each with another strategy than the one before."""
    model, given = build("flux"), inputs("flux")
    expected = output(model, given)
    ways = strategies(meshes)

    def request(number: int) -> None:
        enable_context_parallel(model, verbose=False, **ways[number % len(ways)])
        assert error(output(model, given), expected) < 1e-10
        disable_context_parallel(model)

    return grown(request, first, times)


@torch.no_grad()
def draw(meshes: Any, first: int, times: int) -> Held:
    """Steps of inference."""
    model, given = build("flux"), inputs("flux")
    enable_context_parallel(model, verbose=False, mesh=meshes.heads[2])
    results = []

    def step(number: int) -> None:
        out = output(model, given)
        results[:] = [*results[:1], out] if results else [out]
        assert torch.equal(results[0], out)  # the same bits in every step

    found = grown(step, first, times)
    disable_context_parallel(model)
    return found


@torch.no_grad()
def fail(meshes: Any, first: int, times: int) -> Held:
    """Requests that fail: one rank has another provider when they begin, another size, or an error in a block."""
    model, given, odd = build("flux"), inputs("flux"), dist.get_rank() == 1
    expected = output(model, given)
    others = given | {name: given[name].narrow(-2, 0, 5) for name in ("hidden_states", "img_ids")}

    def request(number: int) -> None:
        mesh = meshes.heads[2]
        with pytest.raises(
            AttentionProviderError, match="attention providers: native on rank 0; _native_math on rank 1"
        ):
            enable_context_parallel(model, verbose=False, mesh=mesh, provider="_native_math" if odd else "native")
        enable_context_parallel(model, verbose=False, mesh=mesh, inputs="check" if number % 2 else "broadcast")
        with pytest.raises(AttentionProviderError, match="on rank 1"):
            output(model, others if odd else given)
        fault = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output(model, given)
        fault.remove()
        assert error(output(model, given), expected) < 1e-10
        disable_context_parallel(model)

    return grown(request, first, times)


def train(meshes: Any, first: int, times: int) -> Held:
    """Steps of training."""
    model, given = build("flux").train(), inputs("flux")
    enable_context_parallel(model, verbose=False, mesh=meshes.lines[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(number: int) -> None:
        output(model, given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = grown(step, first, times)
    disable_context_parallel(model)
    return found


JOBS: dict[Callable[..., Held], tuple[int, int]] = {
    serve: (6, 200),
    fail: (6, 100),
    draw: (20, 500),
    train: (10, 200),
}
"""How often each is done before it is measured, and then, in the long run."""


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
@pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.thorough)])
def test_nothing_grows(pool: Any, job: Callable[..., Held], length: str) -> None:
    first, times = JOBS[job] if length == "long" else (6, 6)
    for found in pool.run(2, job, first=first, times=times):
        keys = MOST.keys + (KEYS_OF_A_GROUP * times if job in (serve, fail) else 0)
        assert all(each <= most for each, most in zip(found, MOST._replace(keys=keys))), found


@torch.no_grad()
def many_sizes(meshes: Any, number: int) -> tuple[list[int], float]:
    """How many graphs of blocks were compiled after each of so many sizes of pictures, and the largest error."""
    torch._dynamo.reset()
    plain, model, graphs = build("flux"), build("flux"), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    apply_compile(model, backend=backend)
    enable_context_parallel(model, verbose=False, mesh=meshes.heads[2])
    worst, compiled = 0.0, []
    for size in range(number):
        given = inputs("flux")
        for name in ("hidden_states", "img_ids"):
            more = given[name].narrow(-2, 0, 1).repeat_interleave(1 + size, dim=-2)
            given[name] = torch.cat([given[name], more], dim=-2)
        worst = max(worst, error(output(model, given), output(plain, given)))
        compiled.append(len(graphs))
    disable_context_parallel(model)
    torch._dynamo.reset()
    return compiled, worst


@pytest.mark.thorough
def test_fifty_sizes_compile_no_graph_after_the_first_few(pool: Any) -> None:
    for compiled, worst in pool.run(2, many_sizes, number=50):
        assert worst < 1e-10
        assert compiled[-1] == compiled[9] < 10, compiled
