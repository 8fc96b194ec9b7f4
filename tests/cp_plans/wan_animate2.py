"""Jobs of `test_wan_animate2.py`: a cache of reference keys, seen frame by frame, over ranks, against one process.

The one process runs diffusers' own processors, with attention token by token under the BlockMask that the model makes:
flex_attention has neither float64 nor gradients on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch.nn.attention.flex_attention import create_mask

from diffusers_attn import (
    AttentionProviderError,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.tiny_models.case import TEXT, Draw
from tests.zoo import CASES, outputs

from ..context_parallel.models import float64_throughout, without_exchange

# (frames, rows, columns) of the video and of its reference, for every sample, and (frames, places of a frame) of what
# the mask is for, which has one frame more for the video. In the pipeline all fit.
SIZES = {
    "as the pipeline": ([(4, 5, 7)], [(3, 5, 7)], (3, 35)),
    "smaller": ([(3, 3, 5)], [(2, 2, 5)], (3, 32)),
    "two samples": ([(4, 3, 5), (4, 5, 3)], [(3, 5, 3), (3, 3, 5)], (3, 15)),
    "last block skipped": ([(4, 3, 5)], [(3, 3, 5)], (3, 15)),
    "too long": ([(5, 3, 5)], [(3, 3, 5)], (3, 15)),
}
LIKE_ONE_PROCESS = ("as the pipeline", "smaller", "two samples")


def build(name, dtype=torch.float64):
    case = CASES["wan_animate2"]
    case = dataclasses.replace(case, config={**case.config, "num_layers": layers(name)})
    model = case.build(dtype=dtype)
    return model.double() if dtype == torch.float64 else model


def layers(name):
    """Passes without a condition skip the tenth."""
    return 10 if name == "last block skipped" else 2


def passes(name, dtype=torch.float64):
    """The arguments of a pass over the reference, and of two over the video, the second without a condition."""
    draw = Draw("cpu", dtype)
    videos, references, (frames, places) = SIZES[name]
    samples, video, reference = len(videos), videos[0], references[0]

    def latents(grids):
        return [draw.normal(4, grid[0], 2 * grid[1], 2 * grid[2]) for grid in grids]

    shared = {
        "kv_cache": WanAnimate2KVCache(layers(name)),
        "encoder_hidden_states_image": draw.normal(samples, 7, 1280),
        "timestep": draw.floats(250),
    }
    grid = torch.tensor(references)
    extract = {
        "hidden_states": latents(references), "condition_latents": latents(references), "kv_cache_mode": "extract",
        "seq_len": reference[0] * reference[1] * reference[2], "offset_grid_sizes": grid,
    }  # fmt: skip
    cached = {
        "hidden_states": latents(videos), "condition_latents": latents(videos), "kv_cache_mode": "cached",
        "seq_len": video[0] * video[1] * video[2], "reference_grid_sizes": grid,
        # Places of a frame are the area over 256, and frames a quarter of the length, and one.
        "origin_len": 4 * frames - 3, "origin_area": [256, places],
    }  # fmt: skip
    texts = [[draw.normal(length, 32) for _ in range(samples)] for length in (TEXT, TEXT, 5)]
    again = {"hidden_states": latents(videos), "is_uncondtion": True}
    return [
        shared | extract | {"encoder_hidden_states": texts[0]},
        shared | cached | {"encoder_hidden_states": texts[1]},
        shared | cached | again | {"encoder_hidden_states": texts[2]},
    ]


@float64_throughout()
def run(model, name):
    """What all passes give, and the gradients of a loss that every element of it takes part in."""
    with masks_without_a_compiler():
        found = torch.cat([each.flatten() for given in passes(name) for each in outputs(model(**given).sample)])
    grads = torch.autograd.grad(found.square().mean(), list(model.parameters()), allow_unused=True)
    return found.detach(), torch.cat(
        [(p * 0 if grad is None else grad).flatten() for grad, p in zip(grads, model.parameters())]
    )


@contextlib.contextmanager
def masks_without_a_compiler():
    upstream = transformer_wan_animate_2.create_block_mask
    transformer_wan_animate_2.create_block_mask = lambda *args, **how: upstream(*args, **how | {"_compile": False})
    try:
        yield
    finally:
        transformer_wan_animate_2.create_block_mask = upstream


@contextlib.contextmanager
def token_by_token():
    """diffusers' processors, with their mask for every token."""
    upstream = transformer_wan_animate_2.dispatch_attention_fn

    def attention(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None:
            attn_mask = create_mask(attn_mask.mask_mod, 1, 1, *attn_mask.shape[-2:], device="cpu")
            # Of rows without any key, which are those of empty places, nothing is kept.
            attn_mask = attn_mask | ~attn_mask.any(dim=-1, keepdim=True)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask).transpose(1, 2)

    transformer_wan_animate_2.dispatch_attention_fn = attention
    try:
        yield
    finally:
        transformer_wan_animate_2.dispatch_attention_fn = upstream


@functools.cache
def alone(name):
    with token_by_token():
        return run(build(name), name)


def compare(meshes, ring, ulysses, rotate_method, name, disabled=False, removal=False):
    """Relative errors of all that comes out, and of the mean of gradients over ranks, with native in float64.
    `removal`: that it restores all, too."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    expected, expected_grad = alone(name)
    model = build(name)
    apply_context_parallel(model, mesh)
    set_attention_provider(model, "native")
    with without_exchange() if disabled else contextlib.nullcontext():
        found, grad = run(model, name)
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    remove_context_parallel(model)
    if removal:
        set_attention_provider(model, None)
        with token_by_token():
            assert all(map(torch.equal, run(model, name), (expected, expected_grad))), "not as before"
    return [error(found, expected), error(grad, expected_grad)]


@torch.no_grad()
def compare_enabled(meshes, ring, ulysses, inputs, provider, filled_before=False):
    """The relative error of what all passes give, in float32, as a user runs them; and how many reference tokens every
    rank's cache holds. `filled_before`: context parallelism is enabled after the cache was filled."""
    name, results = "as the pipeline", []
    for split in (False, True):
        model, given = build(name, torch.float32), passes(name, torch.float32)
        with masks_without_a_compiler(), contextlib.nullcontext() if split else token_by_token():
            if split and filled_before:
                model(**given.pop(0))
            if split:
                mesh = meshes.square if ring > 1 and ulysses > 1 else meshes.lines[ring]
                enable_context_parallel(model, mesh=mesh, provider=provider, inputs=inputs, verbose=False)
            samples = [outputs(model(**each).sample) for each in given]
            results.append(torch.cat([each.flatten() for sample in samples[-2:] for each in sample]))
    disable_context_parallel(model)
    return error(*results[::-1]), given[-1]["kv_cache"].get(0).key.shape[1]


def refusal(meshes, provider, name, change):
    """What a pass over the video, after one over its reference, is refused with on 3 ranks."""
    model, given = build(name, torch.float32), passes(name, torch.float32)
    apply_context_parallel(model, meshes(3, 1))
    if provider is not None:
        set_attention_provider(model, provider)
    try:
        with masks_without_a_compiler(), torch.no_grad():
            model(**given[0])
            if change == "another reference":
                given[1]["reference_grid_sizes"] = torch.tensor([[2, 3, 5]])
            model(**given[1])
    except AttentionProviderError as problem:
        return str(problem)
    return "nothing"


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
