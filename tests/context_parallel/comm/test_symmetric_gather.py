"""The symmetric gather and ring: slots, memory, and the order of operations after compilation."""

import contextlib
import itertools
import re
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.attention import allgather_kv_one_call
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm import symmetric_memory, transport
from diffusers_attn.context_parallel.comm.gather_in_flight import GatherInFlight
from diffusers_attn.context_parallel.comm.gathered_rows import EVERYONE, OTHERS, GatheredRows
from diffusers_attn.context_parallel.comm.symmetric_gather import gather_of
from diffusers_attn.context_parallel.comm.transport import COLLECTIVE, SYMMETRIC, choose_transport
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, split

from ...marks import thorough_but
from ..shared_memory import NoLane, open_shared

LAYERS = 2


def compiled(meshes, ring, backend, length, is_causal, train, masked=False, method="allgather"):
    """Number of graphs, and the largest difference to eager mode over several calls, in two calls of attention; and, of
    Inductor, its code."""
    mesh = meshes(ring, 1, rotate_method=method)
    memory = open_shared(mesh.ring)
    shards = Shards.contiguous(length, mesh.size)
    options = {"query_shards": shards, "key_shards": shards, "is_causal": is_causal, "transport": SYMMETRIC}
    mask = KeyMask(split(torch.rand(2, length) > 0.3, shards, 1, mesh.rank)) if masked else None

    def layers(*tensors):
        query, key, value = (split(tensor.sin(), shards, 1, mesh.rank) for tensor in tensors)
        for layer in range(LAYERS):
            local = query * 2, key * (3 + layer), value.cos() - query
            query = parallel_attention(*local, mask, mesh=mesh, **options).sin()
        return gather(query, shards, 1, mesh)

    torch._dynamo.reset()
    real, allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL, 0.0
    counter = CompileCounterWithBackend(backend)
    function = torch.compile(layers, backend=counter, fullgraph=True, dynamic=False)
    error, code = 0.0, ""
    for _ in range(3):
        inputs = [torch.randn(2, length, 2, 8, requires_grad=train) for _ in range(3)]
        expected = layers(*inputs)
        if backend == "inductor" and not code:
            out, (code, *_) = run_and_get_code(function, *inputs)
        else:
            out = function(*inputs)
        pairs = [(out, expected)]
        if train:
            pairs += zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
        error = max(error, *((one - other).abs().max().item() for one, other in pairs))
    allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = real
    torch._dynamo.reset()
    del memory
    return counter.frame_count, error, code


COMPILED = {
    "inference": {"ring": 3, "length": 11},
    "training": {"ring": 2, "length": 11, "train": True, "masked": True},
    "no queries or keys on a rank": {"ring": 3, "length": 2},
    "nothing to see": {"ring": 3, "length": 11, "is_causal": True, "train": True},
    "a ring": {"ring": 3, "length": 11, "method": "alltoall"},
    "a ring, training": {"ring": 3, "length": 11, "train": True, "masked": True, "method": "alltoall"},
    "a ring, nothing to see": {"ring": 3, "length": 11, "is_causal": True, "train": True, "method": "alltoall"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", thorough_but(["training", "nothing to see", "a ring, training"], COMPILED))
def test_one_graph(pool, case):
    options = {"is_causal": False, "train": False, **COMPILED[case]}
    for graphs, error, _ in pool.run(options["ring"], compiled, backend="aot_eager", **options):
        assert graphs == 1
        assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_inductor(pool, method):
    """Operations keep their order. Tensors are sent without a copy, and live until they have arrived."""
    arguments = {"ring": 2, "length": 12, "is_causal": False, "train": False, "backend": "inductor", "method": method}
    for graphs, error, code in pool.run(2, compiled, **arguments):
        assert graphs == 1
        assert error < 1e-4
        calls = re.findall(
            r"(symmetric_gather_start|symmetric_gather_finish|flash_attention_for_cpu)\.default\((.*)\)$",
            code,
            re.MULTILINE,
        )
        assert [name for name, _ in calls] == [
            "symmetric_gather_start", "flash_attention_for_cpu", "symmetric_gather_finish", "flash_attention_for_cpu"
        ] * LAYERS  # fmt: skip
        for start, local, finish in zip(calls[::4], calls[1::4], calls[2::4]):
            tensors = re.match(r"\[(buf\d+), (buf\d+), (buf\d+)\]", start[1])
            assert finish[1].startswith(tensors[0])
            assert sorted(re.findall(r"buf\d+", local[1])) == sorted(tensors.groups())


def rotations(meshes, captured, known, shifts, calls):
    """Whether all that arrives is right, and still is when it is read late, on ranks that are slow at random."""
    mesh = meshes(3, 1)
    lane = NoLane()
    memory = open_shared(mesh.ring, lane)
    sizes = (3, 4, 5)
    delays = torch.Generator().manual_seed(mesh.rank)
    graph, wrong, unread = contextlib.ExitStack(), [], []

    def read():
        for call, shift, found in unread:
            time.sleep(torch.rand(1, generator=delays).item() * 4e-3)
            gathered = [rank for rank in range(3) if shift == EVERYONE or rank != mesh.rank]
            senders = [(mesh.rank - shift) % 3] if shift > 0 else gathered
            for sign, part in zip((1, -1), found):
                expected = [torch.full((2, sizes[rank], 1, 4), sign * float(10 * call + rank)) for rank in senders]
                wrong.extend([] if torch.equal(part, torch.cat(expected, dim=1)) else [call])
        unread.clear()

    for call in range(calls):
        # As a CUDA graph does: what a capture began with is what its repetitions begin with.
        lane.captured = captured and call >= len(shifts)
        if captured and call % 3 == 0:
            memory._calls = 0
            if known:  # a graph of three calls, repeated
                graph.close()
                graph.enter_context(memory.in_one_graph())
        shift = shifts[call % len(shifts)]
        # What a gather brought is read before the next call, and so is all before another kind, or another graph.
        if min([shift, *(before for _, before, _ in unread)]) <= 0 or (captured and call % 3 == 0):
            read()
        key = torch.full((2, sizes[mesh.rank], 1, 4), float(10 * call + mesh.rank))
        started = GatherInFlight.start(key, key, -key, sizes, mesh.ring, needs_grad=False, shift=shift)
        read()  # of a ring: beside the next step
        unread.append((call, shift, started.finish(key)))
    read()
    del memory
    return wrong


@pytest.mark.parametrize(("captured", "known"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "shifts",
    [(OTHERS,), (EVERYONE,), (1, 2), (EVERYONE, OTHERS, 1, 2)],
    ids=["gather", "gather with its own", "ring", "all"],
)
def test_nothing_is_overwritten_before_it_is_read(pool, captured, known, shifts):
    """`known`: that calls are in one graph, of which then only the first waits for all that came before."""
    assert pool.run(3, rotations, captured=captured, known=known, shifts=shifts, calls=36) == [[]] * 3


def lives(meshes):
    """What the memory does as calls grow, several gathers are under way, and nobody holds it any more."""
    mesh = meshes(2, 1)
    lane = NoLane()
    memory = open_shared(mesh.ring, lane)
    assert open_shared(mesh.ring) is memory is gather_of(mesh.ring.name)
    sizes = []

    def send(rows, value=1.0):
        key = torch.full((1, rows, 2, 64), value)
        return key, GatherInFlight.start(key, key, key, (rows, rows), mesh.ring, needs_grad=False)

    for rows in (10, 20, 5000, 10):
        key, started = send(rows)
        assert torch.equal(started.finish(key)[0], key)
        sizes.append(memory.nbytes)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert 2 * 2 * key.nbytes * 500 < sizes[2] < 1.6 * 2 * 2 * key.nbytes * 500

    lane.captured = True
    with pytest.raises(AttentionProviderError, match="once before it is captured"):
        send(10000)
    key = torch.zeros(1, 3, 2, 64)
    with pytest.raises(AttentionProviderError, match="one dtype"):
        GatherInFlight.start(key, key, key.double(), (3, 3), mesh.ring, needs_grad=False)

    # Two may be under way, as a compiler may have it, and not three.
    key = torch.full((1, 3, 2, 64), 5.0)
    for ticket in (7, 8):
        memory.start([key + ticket, key], (3, 3), ticket)
    received = GatheredRows.of([key, key], (3, 3), mesh.rank)
    assert [received.views(memory.finish(ticket))[0].max().item() for ticket in (8, 7)] == [13.0, 12.0]
    for ticket in (1, 2, 3):
        memory.start([key, key], (3, 3), ticket)
    with pytest.raises(RuntimeError, match="block by block"):
        memory.finish(1)

    del memory, started
    try:
        gather_of(mesh.ring.name)
    except AttentionProviderError as error:
        return str(error)


def test_life_of_the_memory(pool):
    for message in pool.run(2, lives):
        assert "apply_context_parallel" in message


@pytest.mark.parametrize("sizes", [(5, 5), (3, 0, 4), (0, 0, 0, 2)])
def test_what_is_received_is_no_size_that_a_compiler_reuses(sizes):
    """It takes the memory of a tensor for another of at least 0.95 times the size."""
    key, value = torch.empty(2, 1, 3, 64), torch.empty(2, 1, 3, 40)
    for rank, shift in itertools.product(range(len(sizes)), (EVERYONE, OTHERS, 1)):
        received = GatheredRows.of([key, value], sizes, rank, shift)
        flat = torch.arange(received.length)
        parts = received.views(flat)
        assert all(part.numel() < 0.95 * received.length for part in parts)
        rows = {EVERYONE: sum(sizes), OTHERS: sum(sizes) - sizes[rank], 1: sizes[rank - 1]}[shift]
        assert [part.shape[1] for part in parts] == [rows] * 2
        assert not set(parts[0].flatten().tolist()) & set(parts[1].flatten().tolist())
        assert all(part.storage_offset() % 128 == 0 for part in parts)


def choices(meshes):
    return [choose_transport(mesh.ring, mesh.device_type) for mesh in (meshes(2, 1), meshes(1, 2))]


def test_without_gpus_collectives_are_chosen_and_the_reason_is_given(pool):
    for ring, ulysses in pool.run(2, choices):
        assert (ring[0].kind, ring[1]) == (COLLECTIVE, None) and "mesh is of cpu" in ring[0].reason
        assert (ulysses[0].kind, ulysses[1]) == (COLLECTIVE, None) and "one rank" in ulysses[0].reason


def test_pytorch_has_what_symmetric_memory_needs():
    """Private to PyTorch, and so looked at with every version of it: names, and parameters in their order."""
    assert symmetric_memory.missing_interface() is None
    wanted = {
        "empty_strided_p2p": ["size", "stride", "dtype", "device"],
        "get_buffer": ["self", "rank", "sizes", "dtype"],
        "barrier": ["self", "channel", "timeout_ms"],
    }
    interface = symmetric_memory._interface()
    for name, parameters in wanted.items():
        signature = getattr(interface, name).__doc__
        found = re.findall(r"(\w+): ", signature)
        assert found[: len(parameters)] == parameters, f"{name} has become {signature}"


def chosen(meshes, fails):
    """The transport over memory of this kind, if the last rank fails in a step."""
    mesh = meshes(3, 1)
    steps = {"_not_cuda": lambda *_: None, "_make": lambda group: open_shared(group)}
    real = {name: getattr(transport, name) for name in (*steps, "_try")}

    def failing(*args):
        if fails == "_try":  # sends, and finds wrong data
            real["_try"](*args)
        raise RuntimeError("as intended")

    if fails and mesh.rank == mesh.size - 1:
        steps[fails] = failing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric_memory, "missing_interface", lambda: None)
        for name, step in steps.items():
            patch.setattr(transport, name, step)
        return choose_transport(mesh.ring, mesh.device_type)[0]


@pytest.mark.parametrize("fails", [None, "_make", "_try"])
def test_all_ranks_choose_alike(pool, fails):
    """Ranks without a failure would otherwise wait in the next step for the one that failed."""
    expected = (
        transport.Transport(COLLECTIVE, "symmetric memory cannot be used: RuntimeError: as intended")
        if fails
        else transport.Transport(SYMMETRIC, "3 GPUs that reach each other's memory")
    )
    assert pool.run(3, chosen, fails=fails) == [expected] * 3
