"""Every strategy against the definition of attention in one process, outputs and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm import collectives
from diffusers_attn.context_parallel.comm.transport import COLLECTIVE, SYMMETRIC
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask, OuterMask, RowMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, split

from ... import reference
from ..shared_memory import FileMemory, open_shared

# (ring, ulysses, rotate_method); behind "symmetric" through memory that ranks share.
STRATEGIES = {
    "ulysses 2": (1, 2, "allgather"),
    "ring 2": (2, 1, "alltoall"),
    "gather 2": (2, 1, "allgather"),
    "symmetric gather 2": (2, 1, "symmetric allgather"),
    "symmetric ring 2": (2, 1, "symmetric alltoall"),
    "ulysses 3": (1, 3, "allgather"),
    "ring 3": (3, 1, "alltoall"),
    "gather 3": (3, 1, "allgather"),
    "symmetric gather 3": (3, 1, "symmetric allgather"),
    "symmetric ring 3": (3, 1, "symmetric alltoall"),
    "ulysses 4": (1, 4, "allgather"),
    "ring 4": (4, 1, "alltoall"),
    "gather 4": (4, 1, "allgather"),
    "symmetric gather 4": (4, 1, "symmetric allgather"),
    "symmetric ring 4": (4, 1, "symmetric alltoall"),
    "unified ring 2x2": (2, 2, "alltoall"),
    "unified gather 2x2": (2, 2, "allgather"),
    "unified symmetric gather 2x2": (2, 2, "symmetric allgather"),
    "unified symmetric ring 2x2": (2, 2, "symmetric alltoall"),
}
DEFAULTS = {"batch": 2, "heads": 4, "kv_heads": 4, "queries": (13,), "keys": None, "mask": None, "order": "contiguous"}
# Each says how it differs from the defaults. A length for each sequence: (5, 9) is five text and nine image tokens,
# each split on its own.
CASES = {
    "uneven": {},
    "one sample": {"batch": 1, "queries": (12,)},
    "no sample": {"batch": 0},
    "a rank without tokens": {"queries": (3,)},
    "most ranks without tokens": {"queries": (1,), "keys": (6,)},
    "ranks without keys": {"queries": (9,), "keys": (2,)},
    "cross": {"queries": (7,), "keys": (11,)},
    "two sequences": {"queries": (5, 9)},
    "odd heads": {"heads": 3, "kv_heads": 3},
    "more ranks than heads": {"heads": 1, "kv_heads": 1},
    "grouped heads": {"heads": 6, "kv_heads": 3},
    "one key head": {"heads": 4, "kv_heads": 1},
    "scale": {"scale": 0.3},
    "wide values": {"value_dim": 6},
    "key mask": {"mask": "key"},
    "key bias": {"mask": "key bias", "queries": (5, 9)},
    "no key at all in one sample": {"mask": "no key"},
    "rows": {"mask": "rows"},
    "rows of two sequences": {"mask": "rows", "queries": (5, 9)},
    "rows of every head": {"mask": "head rows", "heads": 5, "kv_heads": 5},
    "row bias": {"mask": "bias", "queries": (9,), "keys": (7,)},
    "outer product": {"mask": "outer", "queries": (5, 9)},
    "outer product, additive": {"mask": "outer bias", "queries": (5, 9)},
    "causal": {"is_causal": True},
    "causal zigzag": {"is_causal": True, "order": "zigzag", "queries": (19,)},
    "causal short zigzag": {"is_causal": True, "order": "zigzag", "queries": (3,)},
    "causal, longer keys": {"is_causal": True, "queries": (7,), "keys": (12,)},
    "causal, longer queries": {"is_causal": True, "queries": (12,), "keys": (7,)},
    "causal with padding": {"is_causal": True, "order": "zigzag", "mask": "key"},
    "causal with rows": {"is_causal": True, "order": "zigzag", "mask": "rows"},
    "causal sequences": {"is_causal": True, "queries": (5, 9)},
}


def shards_of(tracker, ranks, order):
    return Shards.joint(*(getattr(Shards, order)(length, ranks) for length in tracker))


def make(case):
    case = DEFAULTS | case
    case["keys"] = case["keys"] or case["queries"]
    batch, heads, queries, keys = case["batch"], case["heads"], sum(case["queries"]), sum(case["keys"])
    random = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    query, key = normal(batch, queries, heads, 8), normal(batch, keys, case["kv_heads"], 8)
    value = normal(batch, keys, case["kv_heads"], case.get("value_dim", 8))
    grad_out = normal(batch, queries, heads, value.shape[-1])
    key_values, query_values = normal(batch, keys), normal(batch, queries)
    if case["mask"] in ("key", "outer"):
        key_values, query_values = key_values > -0.5, query_values > -0.5
    if case["mask"] == "no key":
        key_values = torch.arange(batch).view(batch, 1).expand(batch, keys) > 0
    rows = normal(1, heads if case["mask"] in ("head rows", "bias") else 1, queries, keys)
    full = {
        None: None,
        "key": key_values[:, None, None],
        "no key": key_values[:, None, None],
        "key bias": key_values[:, None, None],
        "rows": rows > 0.0,
        "head rows": rows > 0.0,
        "bias": rows,
        "outer": query_values[:, None, :, None] & key_values[:, None, None, :]
        if key_values.dtype == torch.bool and case["mask"] == "outer"
        else None,
        "outer bias": query_values[:, None, :, None] * key_values[:, None, None, :],
    }[case["mask"]]
    return case, query, key, value, grad_out, full, query_values, key_values


def run_case(mesh, case, transport):
    """This rank's output (of inference and training) and gradients, and what they should be."""
    case, query, key, value, grad_out, full, query_values, key_values = make(case)
    queries, keys = (shards_of(case[name], mesh.size, case["order"]) for name in ("queries", "keys"))

    def local(tensor, shards, dim=1):
        return split(tensor, shards, dim, mesh.rank)

    kind = case["mask"] or ""
    mask = None
    if kind.startswith("outer"):
        mask = OuterMask(local(query_values, queries), local(key_values, keys))
    elif "rows" in kind or kind == "bias":
        mask = RowMask(local(full, queries, 2))
    elif kind:
        mask = KeyMask(local(key_values, keys))
    options = {"is_causal": case.get("is_causal", False), "scale": case.get("scale")}
    inputs = [local(query, queries), local(key, keys), local(value, keys)]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    shards = {"query_shards": queries, "key_shards": keys}
    out = parallel_attention(*inputs, mask, mesh=mesh, transport=transport, **shards, **options)
    with torch.no_grad():
        again = parallel_attention(*inputs, mask, mesh=mesh, transport=transport, **shards, **options)
    found = [again, out, *torch.autograd.grad(out, inputs, local(grad_out, queries))]

    complete = [tensor.transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    expected_out, _ = reference.attention(*complete, full, **options)
    expected = [expected_out, expected_out, *torch.autograd.grad(expected_out, complete, grad_out.transpose(1, 2))]
    expected = [
        local(tensor.transpose(1, 2), shards)
        for tensor, shards in zip(expected, (queries, queries, queries, keys, keys))
    ]
    return found, expected


def meshes_of(meshes, ring, ulysses, rotate_method, **config):
    """Mesh, transport, and the memory that must stay referenced."""
    symmetric, method = rotate_method.startswith("symmetric "), rotate_method.removeprefix("symmetric ")
    mesh = meshes(ring, ulysses, rotate_method=method, **config)
    return (mesh, SYMMETRIC, open_shared(mesh.ring)) if symmetric else (mesh, COLLECTIVE, None)


def compare(meshes, ring, ulysses, rotate_method, cases):
    """The largest difference in outputs and gradients, for every case."""
    mesh, transport, _memory = meshes_of(meshes, ring, ulysses, rotate_method)
    errors = {}
    for name, case in cases.items():
        try:
            found, expected = run_case(mesh, case, transport)
        except Exception as error:
            raise AssertionError(f"case '{name}'") from error
        assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected], name
        errors[name] = max(
            (one - other).abs().max().item() if one.numel() else 0.0 for one, other in zip(found, expected)
        )
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_like_one_process(pool, strategy):
    ring, ulysses, method = STRATEGIES[strategy]
    answers = pool.run(ring * ulysses, compare, ring=ring, ulysses=ulysses, rotate_method=method, cases=CASES)
    for rank, errors in enumerate(answers):
        wrong = {name: error for name, error in errors.items() if not error < 1e-10}
        assert not wrong, f"rank {rank}: {wrong}"


def without_exchange(meshes, **arguments):
    """The same comparison where every rank receives its own data back instead of the others'."""

    def keep(tensor, send, receive, group):
        rows = tensor[:1].expand(sum(receive), *tensor.shape[1:]) if tensor.shape[0] else None
        return tensor.new_zeros(sum(receive), *tensor.shape[1:]) if rows is None else rows.contiguous()

    real = collectives.start_all_to_all, collectives.wait, FileMemory.barrier
    collectives.start_all_to_all, collectives.wait = keep, lambda tensor, group: tensor
    FileMemory.barrier = lambda self, channel: [buffer.zero_() for buffer in self.buffers]
    try:
        return compare(meshes, **arguments)
    finally:
        collectives.start_all_to_all, collectives.wait, FileMemory.barrier = real


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "4" not in name])
def test_the_comparison_notices_a_missing_exchange(pool, strategy):
    ring, ulysses, method = STRATEGIES[strategy]
    cases = {name: CASES[name] for name in ("uneven", "key mask", "rows", "causal zigzag", "grouped heads")}
    answers = pool.run(ring * ulysses, without_exchange, ring=ring, ulysses=ulysses, rotate_method=method, cases=cases)
    for name in cases:
        assert max(errors[name] for errors in answers) > 1e-2, name


def low_precision(meshes, ring, ulysses, rotate_method):
    """Relative errors of bfloat16 attention on this rank: merged in float32, in bfloat16, and of a single process."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 96, 2, 16, generator=random).bfloat16() for _ in range(3)]
    shards = Shards.contiguous(96, ring * ulysses)
    full = [tensor.transpose(1, 2) for tensor in tensors]
    errors = []
    for convert_to_fp32 in (True, False):
        mesh = meshes(ring, ulysses, rotate_method=rotate_method, convert_to_fp32=convert_to_fp32)
        expected = split(reference.attention(*full)[0].transpose(1, 2), shards, 1, mesh.rank)
        local = [split(tensor, shards, 1, mesh.rank) for tensor in tensors]
        out = parallel_attention(*local, mesh=mesh, query_shards=shards, key_shards=shards)
        assert out.dtype == torch.bfloat16
        errors.append(reference.relative_error(out, expected))
    alone = torch.nn.functional.scaled_dot_product_attention(*full).transpose(1, 2)
    return *errors, reference.relative_error(split(alone, shards, 1, mesh.rank), expected)


@pytest.mark.parametrize("method", ["alltoall", "allgather"])
def test_merging_in_float32_keeps_the_precision_of_one_process(pool, method):
    for wide, narrow, alone in pool.run(4, low_precision, ring=4, ulysses=1, rotate_method=method):
        assert wide < 1.5 * alone
        assert narrow < 4 * alone


def refusals(meshes):
    """The messages of calls that must be refused, before any exchange."""
    mesh = meshes(2, 1)
    shards = Shards.contiguous(6, 2)
    local = torch.randn(1, 3, 2, 8)
    options = {"mesh": mesh, "query_shards": shards, "key_shards": shards}
    calls = {
        "length": lambda: parallel_attention(local[:, :2], local, local, **options),
        "ranks": lambda: parallel_attention(local, local, local, **(options | {"mesh": meshes(1, 3)})),
        "provider": lambda: parallel_attention(local, local, local, provider="flash", **options),
        "bias gradient": lambda: parallel_attention(
            local, local, local, KeyMask(torch.zeros(1, 3, requires_grad=True)), **options
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except AttentionProviderError as error:
            messages[name] = str(error)
    return messages


def test_refused_before_anything_is_sent(pool):
    for messages in pool.run(2, refusals):
        assert "2 in dimension 1; its shards say 3 for rank" in messages["length"]
        assert "mesh.size" in messages["ranks"]
        assert "flash" in messages["provider"]
        assert "requires a gradient" in messages["bias gradient"]
