"""Attention in one call over the keys of all ranks, in the blocks of a real model that Inductor compiles."""

import diffusers
import pytest
import torch
from torch._inductor.utils import run_and_get_code

import diffusers_attn
from diffusers_attn.context_parallel.attention import allgather_kv_one_call
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm.transport import SYMMETRIC, Transport
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask, RowMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, split

from ... import reference
from ...marks import thorough_but
from ..shared_memory import open_shared

FLUX = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}
BLOCKS = {"joint": {"num_layers": 2, "num_single_layers": 0}, "single": {"num_layers": 0, "num_single_layers": 2}}


def flux_inputs(text=5, side=3):
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": torch.randn(1, side * side, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 24, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def flux(meshes, blocks):
    """How far a compiled step is from that of one process, and how often the code of a block calls what."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX, **BLOCKS[blocks]).eval().requires_grad_(False)
    expected = model(**flux_inputs())[0]
    mesh = meshes(2, 1)
    memory = open_shared(mesh.ring)
    real = allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL
    allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = float("inf")
    torch._dynamo.reset()
    try:
        diffusers_attn.set_attention_provider(model, "native")
        diffusers_attn.apply_context_parallel(model, mesh).transport = Transport(SYMMETRIC, "as GPUs do")
        diffusers_attn.apply_compile(model)
        out, (code, *_) = run_and_get_code(lambda: model(**flux_inputs())[0])
    finally:
        allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = real
        torch._dynamo.reset()
    del memory
    calls = [
        code.count(f"{name}.default(")
        for name in ("symmetric_gather_start", "symmetric_gather_finish", "flash_attention_for_cpu")
    ]
    return (out - expected).abs().max().item(), calls


@pytest.mark.slow
@pytest.mark.parametrize("blocks", thorough_but(["joint"], BLOCKS))  # both wait for text; "single" has one projection
def test_flux(pool, blocks):
    for error, calls in pool.run(2, flux, blocks=blocks):
        assert error < 1e-5
        assert calls == [1, 1, 1]


def masked(meshes, ring, length, kind, is_causal):
    """The relative error in float64, of this rank's part."""
    mesh = meshes(ring, 1)
    memory = open_shared(mesh.ring)
    shards = (Shards.zigzag if is_causal else Shards.contiguous)(length, mesh.size)
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(2, length, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    keys, rows = (torch.rand(shape, generator=generator) > 0.4 for shape in ((2, length), (2, 1, length, length)))
    seen = {"none": None, "key": keys[:, None, None, :], "rows": rows}[kind]
    mask = {
        "none": lambda: None,
        "key": lambda: KeyMask(split(keys, shards, 1, mesh.rank)),
        "rows": lambda: RowMask(split(rows, shards, 2, mesh.rank)),
    }[kind]()
    options = {"mesh": mesh, "query_shards": shards, "key_shards": shards, "transport": SYMMETRIC}
    local = [split(tensor, shards, 1, mesh.rank) for tensor in full]
    function = torch.compile(
        lambda *tensors: parallel_attention(*tensors, mask, is_causal=is_causal, **options),
        backend="aot_eager",
        fullgraph=True,
        dynamic=False,
    )
    real = allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL
    allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = float("inf")
    try:
        out = gather(function(*local), shards, 1, mesh)
    finally:
        allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL = real
        torch._dynamo.reset()
    del memory
    query, key, value = (tensor.transpose(1, 2) for tensor in full)
    expected, _ = reference.attention(query, key, value, seen, is_causal=is_causal)
    return reference.relative_error(out, expected.transpose(1, 2))


CASES = [("none", False, 11), ("key", False, 11), ("rows", False, 11), ("none", True, 13), ("key", False, 2)]


@pytest.mark.parametrize(
    ("ring", "kind", "is_causal", "length"),
    thorough_but(
        lambda case: case[0] == 2 or case[3] == 2,  # on three ranks: one of them without a token
        [(ring, *case) for ring in (2, 3) for case in CASES],
    ),
)
def test_by_definition(pool, ring, kind, is_causal, length):
    """Lengths that do not divide, ranks with no token, grouped heads, masks and causality."""
    for error in pool.run(ring, masked, ring=ring, kind=kind, is_causal=is_causal, length=length):
        assert error < 1e-12
