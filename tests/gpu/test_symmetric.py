"""The gather of keys and values through symmetric memory: on two GPUs or more, against collectives, and for races.

Races do not show by themselves: delays on streams and hosts, other ones on each rank and in each call, spread what
should be in order. Numbers that are only moved must arrive exactly.
"""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import AttentionProviderError, apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.attention import allgather_kv_one_call
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm import symmetric_gather, symmetric_memory, transport
from diffusers_attn.context_parallel.comm.gather_in_flight import GatherInFlight
from diffusers_attn.context_parallel.comm.gathered_rows import EVERYONE, OTHERS
from diffusers_attn.context_parallel.comm.transport import COLLECTIVE, SYMMETRIC, choose_transport
from diffusers_attn.context_parallel.sequences.sharding import Shards, split
from diffusers_attn.cp_plans.plan import CPInput, ParamId

from .. import reference
from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS
BF16 = torch.bfloat16


def delay(chance=0.3):
    """Sometimes, the GPU's stream or the host waits a while, and other ranks' do not."""
    if random.random() < chance:
        torch.cuda._sleep(random.randrange(2_000_000))
    if random.random() < chance / 3:
        time.sleep(random.random() * 2e-3)


def opened(meshes, strategy="gather"):
    """The mesh of a ring over all GPUs, and what must be held."""
    mesh = meshes(strategy)
    chosen, gather = choose_transport(mesh.ring, mesh.device_type)
    assert chosen.kind == SYMMETRIC, chosen.reason
    random.seed(mesh.rank)
    return mesh, gather


def numbers(call, rank, rows, batch, heads=3, head_dim=64):
    """Whole numbers that bfloat16 has exactly, others for every call and rank."""
    count = batch * rows * heads * head_dim
    values = (torch.arange(count, device="cuda") * 7 + call * 31 + rank * 101) % 251
    return values.to(BF16).view(batch, rows, heads, head_dim)


def wrong_numbers(meshes, batch, sizes, calls, shift):
    """How many of the numbers that many gathers brought are wrong."""
    mesh, gather = opened(meshes)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for call in range(calls):
        key, value = (numbers(call + 1000 * n, mesh.rank, sizes[mesh.rank], batch) for n in (0, 1))
        delay()
        started = GatherInFlight.start(key, key, value, sizes, mesh.ring, needs_grad=False, shift=shift)
        delay()
        found = started.finish(key)
        delay()  # what has arrived must stay until it is read
        for n, part in enumerate(found):
            senders = [rank for rank in range(mesh.size) if shift == EVERYONE or rank != mesh.rank]
            expected = [numbers(call + 1000 * n, rank, sizes[rank], batch) for rank in senders]
            wrong += (part != torch.cat(expected, dim=1)).sum()
    del gather
    return wrong.item()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", ["even", "uneven", "none"])
@pytest.mark.parametrize("shift", [OTHERS, EVERYONE], ids=["of others", "of all"])
def test_numbers_arrive_as_they_were(gpus, batch, rows, shift):
    sizes = {"even": [640] * SIZE, "uneven": [700, 11, 650, 333], "none": [0, 500, 1, 0]}[rows][:SIZE]
    assert gpus.run(SIZE, wrong_numbers, batch=batch, sizes=tuple(sizes), calls=300, shift=shift) == [0] * SIZE


def replays(meshes, layers, rounds, shift):
    """How many numbers are wrong in graphs of several gathers, replayed between gathers in eager mode."""
    mesh, gather = opened(meshes)
    sizes = tuple(range(600, 600 + SIZE))
    others = [rank for rank in range(mesh.size) if shift == EVERYONE or rank != mesh.rank]
    given = [numbers(0, mesh.rank, sizes[mesh.rank], 1) for _ in range(2)]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def gathers(count):
        found = []
        for layer in range(count):
            key, value = given[0] + layer, given[1] + layer
            started = GatherInFlight.start(key, key, value, sizes, mesh.ring, needs_grad=False, shift=shift)
            key.sum()
            found.append([part.clone() for part in started.finish(key)])
        return found

    def check(found, call):
        for layer, parts in enumerate(found):
            for n, part in enumerate(parts):
                full = torch.cat([numbers(call + 1000 * n, rank, sizes[rank], 1) for rank in others], dim=1)
                wrong.add_((part != full + layer).sum())

    graphs = []
    gathers(1)
    for count in (layers, 1):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = gathers(count)
        graphs.append((graph, found))
    order = random.Random(0)  # the same on all ranks
    for call in range(rounds):
        for n in range(2):
            given[n].copy_(numbers(call + 1000 * n, mesh.rank, sizes[mesh.rank], 1))
        delay()
        choice = order.randrange(3)
        if choice < 2:
            graph, found = graphs[choice]
            graph.replay()
        else:
            found = gathers(2)
        delay()
        check(found, call)
    # A call that needs more memory than there is: graphs keep theirs.
    large = numbers(1, mesh.rank, 5000, 1)
    GatherInFlight.start(large, large, large, (5000,) * mesh.size, mesh.ring, needs_grad=False).finish(large)
    graphs[0][0].replay()
    check(graphs[0][1], rounds - 1)
    result = wrong.item()
    del graphs, gather
    return result


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("shift", [OTHERS, EVERYONE], ids=["of others", "of all"])
def test_in_cuda_graphs(gpus, layers, shift):
    assert gpus.run(SIZE, replays, layers=layers, rounds=200, shift=shift) == [0] * SIZE


def refused_in_capture(meshes):
    mesh, gather = opened(meshes)
    key = torch.randn(1, 4000, 16, 128, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    message = ""
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            GatherInFlight.start(key, key, key, (4000,) * mesh.size, mesh.ring, needs_grad=False)
        except AttentionProviderError as error:
            message = str(error)
        graph.capture_end()
    del gather
    return message


def test_memory_cannot_grow_in_a_capture(gpus):
    for message in gpus.run(SIZE, refused_in_capture):
        assert "once before it is captured" in message


def attention(meshes, strategy, mode, length, heads, calls):
    """Largest relative differences of outputs and gradients between the transports, over several calls."""
    mesh, gather = opened(meshes, strategy)
    shards = Shards.contiguous(length, mesh.size)

    def layers(query, key, value, transport):
        options = {"query_shards": shards, "key_shards": shards, "mesh": mesh, "transport": transport}
        for layer in range(3):
            key = key + layer
            query = parallel_attention(query * 2, key, value, provider="_native_cudnn", **options)
        return query

    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=counter, fullgraph=True, dynamic=False)
    real = allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL
    allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = math.inf if mode == "compiled, one call" else 0.0
    ours = layers if mode.startswith("eager") else compiled
    worst = torch.zeros((), device="cuda")
    train = mode.endswith("training")
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(calls):
        full = [torch.randn(2, length, heads, 64, generator=generator, device="cuda").to(BF16) for _ in range(3)]
        local = [split(tensor, shards, 1, mesh.rank).clone().requires_grad_(train) for tensor in full]
        results = []
        for function, kind in ((ours, SYMMETRIC), (layers, COLLECTIVE)):
            delay()
            out = function(*local, kind)
            grads = torch.autograd.grad(out.float().square().sum(), local) if train else ()
            results.append([out, *grads])
        for one, other in zip(*results):
            error = (one.float() - other.float()).norm() / other.float().norm()
            worst = torch.maximum(worst, error.detach())
    allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = real
    torch._dynamo.reset()
    del gather
    return counter.frame_count, worst.item()


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("mode", ["eager", "eager training", "compiled", "compiled, one call", "compiled training"])
@pytest.mark.parametrize("length", [1024, 1003])
def test_attention_is_that_of_collectives(gpus, strategy, mode, length, record):
    for graphs, error in gpus.run(SIZE, attention, strategy=strategy, mode=mode, length=length, heads=4, calls=30):
        assert graphs == (1 if mode.startswith("compiled") else 0)
        record("symmetric memory", mode, error, 1e-2)


class Halves(torch.nn.Module):
    """Too small to be worth splitting, and with a plan."""

    plan = {"": {ParamId("x", 0): CPInput(1)}}

    def forward(self, x):
        return x


def life(meshes):
    """The reported transport, and the device's memory before, with and after it, in MiB."""
    mesh = meshes("gather")
    torch.cuda.synchronize()

    def used():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    models = [Halves(), Halves()]
    apply_context_parallel(models[0], mesh, Halves.plan)  # what the first one brings, beside its memory, stays
    remove_context_parallel(models[0])
    before = used()
    tracker = [apply_context_parallel(model, mesh, Halves.plan) for model in models]
    gather = symmetric_gather.gather_of(mesh.ring.name)
    key = torch.zeros(1, 16384, 16, 128, device="cuda", dtype=BF16)
    GatherInFlight.start(key, key, key, (16384,) * mesh.size, mesh.ring, needs_grad=False).finish(key)
    torch.cuda.synchronize()
    expected, during = gather.nbytes / 2**20, used() - key.nbytes / 2**20
    del gather
    remove_context_parallel(models[0])
    symmetric_gather.gather_of(mesh.ring.name)  # the other model's still
    remove_context_parallel(models[1])
    del key
    torch.cuda.empty_cache()
    depends_on = used()
    with pytest.raises(AttentionProviderError, match="removed"):
        symmetric_gather.gather_of(mesh.ring.name)
    return [each.transport for each in tracker], before, during, depends_on, expected


def test_memory_lives_as_long_as_a_model_needs_it(gpus):
    for transports, before, during, depends_on, expected in gpus.run(SIZE, life):
        assert [each.kind for each in transports] == [SYMMETRIC] * 2
        # Two slots of the keys and values of the other ranks.
        assert expected == pytest.approx(2 * (SIZE - 1) * 2 * 64, rel=0.1)
        assert during - before == pytest.approx(expected, rel=0.2)
        assert depends_on - before < 8


def fall_back(meshes, step):
    """The transport that is chosen where the last rank fails in a step."""
    mesh = meshes("gather")
    real = {"_make": transport._make, "_try": transport._try, "_interface": symmetric_memory._interface}[step]

    def fails(*args):
        if step == "_try":  # sends, and finds wrong data
            real(*args)
        raise RuntimeError("as intended")

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == SIZE - 1:
            patch.setattr(symmetric_memory if step == "_interface" else transport, step, fails)
        patch.setattr(symmetric_memory, "missing_interface", lambda: None)
        return choose_transport(mesh.ring, mesh.device_type)[0]


@pytest.mark.parametrize("step", ["_make", "_interface", "_try"])
def test_all_ranks_choose_alike(gpus, step):
    """The other ranks would otherwise wait on their GPUs for the one that failed."""
    for kind, reason in gpus.run(SIZE, fall_back, step=step):
        assert kind == COLLECTIVE and "RuntimeError: as intended" in reason


def different_from_float64(meshes, batch):
    mesh, gather = opened(meshes)
    shards = Shards.contiguous(777, mesh.size)
    generator = torch.Generator("cuda").manual_seed(0)
    full = [torch.randn(batch, 777, 6, 128, generator=generator, device="cuda").to(BF16) for _ in range(3)]
    local = [split(tensor, shards, 1, mesh.rank) for tensor in full]
    options = {"query_shards": shards, "key_shards": shards, "mesh": mesh, "transport": SYMMETRIC}
    out = parallel_attention(*local, provider="_native_cudnn", **options)
    expected, _ = reference.attention(*(tensor.transpose(1, 2) for tensor in full))
    dist.barrier()
    del gather
    return reference.relative_error(out, split(expected.transpose(1, 2), shards, 1, mesh.rank))


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_by_its_definition(gpus, batch, record):
    for error in gpus.run(SIZE, different_from_float64, batch=batch):
        record("symmetric memory", "output", error, 5e-3)
