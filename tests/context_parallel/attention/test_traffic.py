"""The log's message about a split call: once for each kind, with the bytes that the call really sends."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn.context_parallel.attention.block_attention import BlockAttention
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.attention.partial_kernel import PartialKernel
from diffusers_attn.context_parallel.attention.traffic import note
from diffusers_attn.context_parallel.comm.group import ALONE, Group
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.context_parallel.sequences.sharding import Shards, split
from diffusers_attn.logs import debugging


class Sent(TorchDispatchMode):
    """Counts the exchanges, and the bytes that go to other ranks."""

    def __init__(self, *groups):
        super().__init__()
        self.ranks = {group.name: group.rank for group in groups}
        self.bytes = self.exchanges = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            tensor, _, send, group = args
            self.exchanges += 1
            row = math.prod(tensor.shape[1:]) * tensor.element_size()
            self.bytes += row * sum(each for rank, each in enumerate(send) if rank != self.ranks[group])
        return func(*args, **(kwargs or {}))


def predicted_and_sent(meshes, ring, ulysses, method, batch):
    mesh = meshes(ring, ulysses, rotate_method=method)
    shards = Shards.contiguous(13, mesh.size)
    query, key, value = (
        split(torch.randn(batch, 13, heads, dim), shards, 1, mesh.rank) for heads, dim in ((6, 8), (3, 8), (3, 4))
    )
    logger = logging.getLogger("diffusers_attn.context_parallel.attention.traffic")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    level = logging.getLogger("diffusers_attn").level
    logging.getLogger("diffusers_attn").setLevel(logging.DEBUG)
    try:
        with Sent(mesh.ring, mesh.ulysses) as sent:
            parallel_attention(query, key, value, mesh=mesh, query_shards=shards, key_shards=shards)
        parallel_attention(query, key, value, mesh=mesh, query_shards=shards, key_shards=shards)
    finally:
        logging.getLogger("diffusers_attn").setLevel(level)
        logger.removeHandler(handler)
    return messages, sent.bytes


@pytest.mark.parametrize(
    ("ring", "ulysses", "method", "words"),
    [
        (1, 3, "allgather", "ulysses_degree=3, ring_degree=1 (every rank attends to the full sequence"),
        (3, 1, "alltoall", "ulysses_degree=1, ring_degree=3 (keys and values pass from rank to rank"),
        (3, 1, "allgather", "ring_degree=3 (keys and values of other ranks arrive during"),
        (2, 2, "alltoall", "attention over 4 ranks by native: ulysses_degree=2, ring_degree=2"),
    ],
)
def test_a_message_has_the_bytes_that_are_sent(pool, ring, ulysses, method, words):
    for (message,), sent in pool.run(
        ring * ulysses, predicted_and_sent, ring=ring, ulysses=ulysses, method=method, batch=11 + ring
    ):
        assert words in message
        assert re.search(r"sends ([\d,]+) bytes", message)[1].replace(",", "") == str(sent) != "0"


def test_a_graph_for_any_length(caplog):
    """Its message is printed while it is compiled, once, with the bytes for 1,000 tokens."""
    group = Group("of two", 0, 2)
    mesh = ContextParallelMesh(ContextParallelConfig(ulysses_degree=2), ALONE, group)

    def forward(query):
        shards = Shards.contiguous(2 * query.shape[1], 2)
        call = BlockAttention(PartialKernel("native", (), None, False), ALONE, shards, shards)
        if debugging():
            note(query, query, query, call, mesh, "one_rank", "native")
        return query + 1

    caplog.set_level(logging.DEBUG, "diffusers_attn")
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    for length in (4, 6, 7):
        compiled(torch.randn(2, length, 4, 8))
    (message,) = [each.getMessage() for each in caplog.records if each.name.endswith(".traffic")]
    assert "any length" in message and f"sends {4 * 1000 * 2 * 8 * 4:,} bytes for each 1,000 of its tokens" in message


def exchanges_and_errors(meshes, degrees, method, kv_heads, batch, value_dim=8):
    """The exchanges of a forward and of its backward, and the largest difference from one process."""
    mesh = meshes(*degrees, rotate_method=method)
    shards = Shards.contiguous(13, mesh.size)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, 13, *tail, generator=generator, dtype=torch.float64)
        for tail in ((6, 8), (kv_heads, 8), (kv_heads, value_dim))
    ]
    full = [tensor.clone().requires_grad_() for tensor in tensors]
    repeated = [full[0], *(tensor.repeat_interleave(6 // kv_heads, dim=2) for tensor in full[1:])]
    out = torch.nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in repeated)).transpose(1, 2)
    out.square().sum().backward()
    mine = [split(tensor, shards, 1, mesh.rank).clone().requires_grad_() for tensor in tensors]
    with Sent(mesh.ring, mesh.ulysses) as forward:
        found = parallel_attention(*mine, mesh=mesh, query_shards=shards, key_shards=shards)
    with Sent(mesh.ring, mesh.ulysses) as backward:
        found.square().sum().backward()
    pairs = [(found, out), *((one.grad, other.grad) for one, other in zip(mine, full))]
    errors = [(one - split(other, shards, 1, mesh.rank)).abs().max().item() for one, other in pairs]
    return forward.exchanges, backward.exchanges, max(errors)


@pytest.mark.parametrize(
    ("ulysses", "kv_heads", "batch", "exchanges"), [(2, 6, 1, 2), (3, 6, 2, 2), (4, 6, 2, 2), (3, 3, 1, 4)]
)
def test_query_key_and_value_of_equal_shapes_are_one_exchange(pool, ulysses, kv_heads, batch, exchanges):
    """Also for heads that do not divide evenly (6 over 4 ranks), and in the backward. Key heads that are fewer are sent
    by themselves."""
    for forward, backward, error in pool.run(
        ulysses, exchanges_and_errors, degrees=(1, ulysses), method="allgather", kv_heads=kv_heads, batch=batch
    ):
        assert (forward, backward) == (exchanges, exchanges)
        assert error < 1e-12


@pytest.mark.parametrize(
    ("method", "degrees", "tails", "exchanges"),
    [
        ("allgather", (3, 1), {"kv_heads": 3, "value_dim": 5}, (1, 2)),
        ("alltoall", (4, 1), {"kv_heads": 3, "value_dim": 5}, (3, 7)),
        ("allgather", (2, 2), {"kv_heads": 6}, (3, 4)),
    ],
)
def test_keys_and_values_are_one_exchange(pool, method, degrees, tails, exchanges):
    """And so are their gradients, also for grouped heads and another head_dim of the value. The backward exchanges
    keys and values again, and gradients; around a ring, these are exchanged once more than there are other ranks.
    Ulysses around a gather adds two exchanges to each."""
    arguments = {"degrees": degrees, "method": method, "batch": 2, **tails}
    for forward, backward, error in pool.run(math.prod(degrees), exchanges_and_errors, **arguments):
        assert (forward, backward) == exchanges
        assert error < 1e-12
