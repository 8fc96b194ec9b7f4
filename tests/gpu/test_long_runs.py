"""Long runs on GPUs hold no more memory at their end than after their first part: steps that are replayed, training,
sizes that change, and requests that each take another strategy."""

from __future__ import annotations

import gc

import pytest
import torch

from diffusers_attn import (
    apply_cuda_graphs,
    cuda_graphs_status,
    disable_context_parallel,
    enable_context_parallel,
    remove_cuda_graphs,
    set_attention_provider,
)

from ..parallelize.test_enable import build, inputs, output
from ..parallelize.test_long_runs import Held, grown
from .several import SIZE

MIB = 2**20


def model_and_inputs():
    given = inputs("flux")
    return build("flux").to("cuda"), {
        name: each.to("cuda") if isinstance(each, torch.Tensor) else each for name, each in given.items()
    }


def held_on_device():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def grown_on_device(work, first, times):
    """Bytes that are allocated and reserved after `times` more times of work than after `first`."""
    for number in range(first):
        work(number)
    before = held_on_device()
    for number in range(times):
        work(number)
    return tuple(after - each for after, each in zip(held_on_device(), before))


def larger(given, rows):
    """With more tokens."""
    more = {name: given[name].narrow(-2, 0, 1).repeat_interleave(rows, dim=-2) for name in ("hidden_states", "img_ids")}
    return given | {name: torch.cat([given[name], each], dim=-2) for name, each in more.items()}


@pytest.mark.gpu
@torch.no_grad()
def test_500_steps_and_50_sizes_with_graphs():
    model, given = model_and_inputs()
    set_attention_provider(model, "native")
    apply_cuda_graphs(model, max_graphs=4)
    expected = output(model, given)

    def step(_):
        assert torch.equal(output(model, given), expected)  # the same bits in every step

    allocated, reserved = grown_on_device(step, 20, 480)
    assert allocated == 0 and reserved <= 2 * MIB, (allocated, reserved)
    assert cuda_graphs_status(model).replays > 400
    sizes = [larger(given, 1 + size) for size in range(50)]

    def size(number):
        for _ in range(3):  # runs, is recorded, is replayed
            output(model, sizes[number % 50])

    allocated, reserved = grown_on_device(size, 10, 50)
    assert allocated < 8 * MIB and reserved < 64 * MIB, (allocated, reserved)
    remove_cuda_graphs(model)


@pytest.mark.gpu
def test_200_steps_of_training():
    model, given = model_and_inputs()
    set_attention_provider(model.train(), "native")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(_):
        output(model, given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert grown_on_device(step, 5, 195)[0] == 0


@torch.no_grad()
def serve(meshes, times):
    """What requests add, each with another strategy than the one before: on the device, and in this process."""
    model, given = model_and_inputs()
    ways = [
        {"ulysses_degree": SIZE},
        {"ring_degree": SIZE, "rotate_method": "alltoall"},
        {"ring_degree": SIZE, "rotate_method": "allgather"},
    ]
    expected = output(model, given)

    def request(number):
        enable_context_parallel(model, verbose=False, **ways[number % len(ways)])
        for _ in range(3):
            found = output(model, given)
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
        disable_context_parallel(model)

    on_host: list[Held] = []
    on_device = grown_on_device(lambda _: on_host.append(grown(request, 0, times)), 1, 1)
    return on_device, on_host[-1]


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(SIZE < 2, reason=f"needs two CUDA devices or more; PyTorch sees {SIZE}")
def test_requests_with_other_strategies(gpus):
    for (allocated, _), host in gpus.run(SIZE, serve, times=12):
        assert allocated < 8 * MIB, allocated
        assert host.threads <= 4 and host.groups == 0 and host.bytes < 256 * MIB, host
