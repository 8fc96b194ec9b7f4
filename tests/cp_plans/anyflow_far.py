"""Jobs of `test_anyflow_far.py`: chunks of frames that see earlier ones, over ranks, against one process.

The one process runs diffusers' own processors, with attention token by token under the BlockMask that the model makes:
flex_attention has neither float64 nor gradients on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools

import torch
from diffusers.models.transformers import transformer_anyflow_far
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask

from diffusers_attn import (
    AttentionProviderError,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.processors.binding import attention_modules_of
from diffusers_attn.processors.bound import bind
from diffusers_attn.scope import ProviderChoice
from diffusers_attn.tiny_models.case import TEXT, Draw
from tests.zoo import BATCH, CASES, outputs

from ..context_parallel.models import float64_throughout, without_exchange

CHUNKS = (1, 2, 2)
# The model's limits of chunks that are not compressed; the cache has one fewer. Of five frames 35 tokens each: with a
# limit of 1 the first three frames have 6 each, so that [compressed, full] are 88 and, with clean ones, 158.
LIMITS = {"all full": 3, "compressed": 1, "clean": 1, "rollout": 2}
HEIGHT, WIDTH = 10, 14


def build(name, dtype=torch.float64):
    case = CASES["anyflow_far"]
    case = dataclasses.replace(case, config={**case.config, "full_chunk_limit": LIMITS[name]})
    model = case.build(dtype=dtype)
    return model.double() if dtype == torch.float64 else model


def inputs(name, dtype=torch.float64):
    drawn = CASES["anyflow_far"].inputs(dtype=dtype)
    if name == "clean":
        draw = Draw("cpu", dtype, seed=1)
        drawn["clean_hidden_states"] = draw.normal(BATCH, CHUNKS[-1], 4, HEIGHT, WIDTH)
        drawn["clean_timestep"] = draw.steps()[:, None].repeat(1, CHUNKS[-1]) / 8
    return drawn


def empty_cache(model, dtype, chunks=CHUNKS):
    """As the pipeline makes it: with room for as many tokens as there can be."""
    full, compressed = 35 * max(chunks), 6 * max(chunks)
    config = model.config
    shape = BATCH, config.num_attention_heads
    return {
        layer: {
            "full_cache": torch.zeros(2, *shape, config.full_chunk_limit * full, 16, dtype=dtype),
            "compressed_cache": torch.zeros(
                2, *shape, (len(chunks) - config.full_chunk_limit + 1) * compressed, 16, dtype=dtype
            ),
        }
        for layer in range(config.num_layers)
    }


def rollout(model, dtype=torch.float64, chunks=CHUNKS):
    """Chunk after chunk, as the pipeline does: two steps from the cache, and what came of them goes into it. Returns
    what all steps gave, and what is in the cache at last."""
    draw = Draw("cpu", dtype)
    video = draw.normal(BATCH, sum(chunks), 4, HEIGHT, WIDTH)
    text = draw.normal(BATCH, TEXT, 32)
    cache, found = empty_cache(model, dtype, chunks), []
    flag = {"num_cached_chunks": 0, "is_cache_step": False}

    def step(latents, chunks, time, **more):
        times = draw.floats(*[time] * BATCH)[:, None].repeat(1, latents.shape[1])
        return model(
            hidden_states=latents, timestep=times, r_timestep=times / 2, encoder_hidden_states=text,
            chunk_partition=list(chunks), kv_cache=cache, kv_cache_flag=copy.deepcopy(flag), **more,
        )  # fmt: skip

    for index, frames in enumerate(chunks):
        before = sum(chunks[:index])
        own = video[:, before : before + frames]
        for time in (700.0, 250.0):
            found.append(step(own, chunks[: index + 1], time).sample)
            own = own - 0.1 * found[-1]
        video = torch.cat([video[:, :before], own, video[:, before + frames :]], dim=1)
        if index + 1 < len(chunks):
            flag["is_cache_step"] = True
            mask = model.build_attention_mask(
                chunk_partition=list(chunks[: index + 1]), height=HEIGHT, width=WIDTH, mode="cache", device="cpu"
            )
            result = step(video[:, : before + frames], chunks[: index + 1], 0.0, attention_mask=mask)
            assert result.sample is None
            cache = result.kv_cache
            flag |= {"is_cache_step": False, "num_cached_chunks": index + 1}
    return found, [each for layer in cache.values() for each in layer.values()]


@float64_throughout()
def run(model, name):
    """Everything that comes out, and the gradients of a loss that every element of the samples takes part in."""
    samples, cached = rollout(model) if name == "rollout" else (outputs(model(**inputs(name))), [])
    loss = torch.cat([each.flatten() for each in samples]).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    found = torch.cat([each.detach().flatten() for each in samples + cached])
    return found, torch.cat([(p * 0 if grad is None else grad).flatten() for grad, p in zip(grads, model.parameters())])


@contextlib.contextmanager
def token_by_token():
    """diffusers' processors, with their mask for every token."""
    upstream = transformer_anyflow_far.dispatch_attention_fn

    def attention(query, key, value, attn_mask=None, scale=None, **kwargs):
        if attn_mask is not None:
            attn_mask = create_mask(attn_mask.mask_mod, 1, 1, *attn_mask.shape[-2:], device="cpu")
            # Of rows without any key, which are those that are filled up, nothing is kept.
            attn_mask = attn_mask | ~attn_mask.any(dim=-1, keepdim=True)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale).transpose(1, 2)

    transformer_anyflow_far.dispatch_attention_fn = attention
    try:
        yield
    finally:
        transformer_anyflow_far.dispatch_attention_fn = upstream


@functools.cache
def alone(name):
    with token_by_token():
        return run(build(name), name)


def compare(meshes, ring, ulysses, rotate_method, name, disabled=False, checkpointing=False, removal=False):
    """Relative errors of all that comes out, and of the mean of gradients over ranks, with native in float64.
    `removal`: that it restores all, too."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    expected, expected_grad = alone(name)
    model = build(name)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
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
def compare_enabled(meshes, ring, ulysses, inputs, provider):
    """The relative error of a rollout in float32 as a user runs it, and whether the caches are the user's own."""
    with token_by_token():
        expected = [*rollout(build("rollout", torch.float32), torch.float32)]
    model = build("rollout", torch.float32)
    mesh = meshes.square if ring > 1 and ulysses > 1 else meshes.lines[ring]
    enable_context_parallel(model, mesh=mesh, provider=provider, inputs=inputs, verbose=False)
    given, returned = [], []
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["kv_cache"]), with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: returned.append(output.kv_cache))
    found = rollout(model, torch.float32)
    disable_context_parallel(model)
    flat = [torch.cat([each.flatten() for part in parts for each in part]) for parts in (found, expected)]
    return error(*flat), all(one is given[0] for one in given + returned)


@torch.no_grad()
def cache_of_flex(meshes, provider):
    """The relative error of what a step puts into the cache, in float32, bound to who does not take its mask."""
    caches = []
    for split in (False, True):
        model, drawn = build("rollout", torch.float32), inputs("rollout", torch.float32)
        cache = empty_cache(model, torch.float32)
        drawn |= {"kv_cache": cache, "kv_cache_flag": {"is_cache_step": True}}
        if split:
            apply_context_parallel(model, meshes(2, 1))
            for _, module in attention_modules_of(model):
                if "Causal" in type(module.processor).__name__:  # a DispatchProcessor would refuse it on a CPU
                    module.processor = bind(module.processor, ProviderChoice.of(provider))
        with contextlib.nullcontext() if split else token_by_token():
            model(**drawn)
        caches.append(torch.cat([each.flatten() for layer in cache.values() for each in layer.values()]))
    return error(*caches)


def refusal(meshes, provider, change):
    """What a forward is refused with, by whoever refuses it, on 3 ranks."""
    model, drawn = build("compressed", torch.float32), inputs("compressed", torch.float32)
    apply_context_parallel(model, meshes(3, 1))
    if provider is not None:
        set_attention_provider(model, provider)
    if change == "mask with clean frames":
        drawn["attention_mask"] = model.build_attention_mask(
            chunk_partition=list(CHUNKS), height=HEIGHT, width=WIDTH, has_clean_context=True, device="cpu"
        )
    elif change == "mask of all pairs":
        drawn["attention_mask"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    try:
        model(**drawn)
    except AttentionProviderError as problem:
        return str(problem)
    return "nothing"


def compiled(meshes, ring, ulysses):
    """How many graphs the blocks make, and the relative difference to eager mode."""
    model, drawn = build("compressed", torch.float32), inputs("compressed", torch.float32)
    apply_context_parallel(model, meshes(ring, ulysses))
    set_attention_provider(model, "native")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for compiles in (False, True):
        for block in model.blocks if compiles else ():
            block.compile(backend=counter, fullgraph=True, dynamic=False)
        out = model(**drawn).sample
        grads = torch.autograd.grad(out.square().mean(), list(model.blocks.parameters()))
        results.append(torch.cat([each.detach().flatten() for each in (out, *grads)]))
    torch._dynamo.reset()
    return counter.frame_count, error(results[1], results[0])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
