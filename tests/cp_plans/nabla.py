"""Jobs of `test_nabla.py`: models that choose blocks of keys, over ranks, against one process.

The one process runs diffusers' own processors, with attention token by token under the BlockMask that they make. On a
CPU it cannot be done as diffusers does: flex_attention has no gradients there, and its uncompiled form looks at a
BlockMask's function alone, which these masks have none of.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import AttentionProviderError, set_attention_provider
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.processors import entry_points
from diffusers_attn.scope import ProviderChoice
from diffusers_attn.tiny_models.case import BATCH, TEXT, Draw
from tests.zoo import CASES

from ..context_parallel.models import run, without_exchange

FRAMES, HEIGHT, WIDTH = 5, 16, 8  # of tokens: 10 blocks of 64, which neither 3 nor 4 ranks divide
BLOCKS = 10
MODULES = {"kandinsky5": "transformer_kandinsky", "kandinsky6_sr": "transformer_kandinsky6_sr"}


def build(name, dtype=torch.float64):
    return CASES[name].build(dtype=dtype).to(dtype)


def inputs(name, dtype=torch.float64, frames=FRAMES):
    draw = Draw("cpu", dtype)
    if name == "kandinsky6_sr":
        return {"hidden_states": draw.normal(BATCH, frames, HEIGHT, WIDTH, 9), "timestep": draw.steps()}
    near = torch.eye(2 * frames, dtype=torch.bool)[None, None]
    near[..., 0] = True
    return {
        "hidden_states": draw.normal(BATCH, frames, 2 * HEIGHT, 2 * WIDTH, 4),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "pooled_projections": draw.normal(BATCH, 24),
        "visual_rope_pos": [torch.arange(size) for size in (frames, HEIGHT, WIDTH)],
        "text_rope_pos": torch.arange(TEXT),
        "sparse_params": {"to_fractal": True, "sta_mask": near, "P": 0.5},
    }


@contextlib.contextmanager
def token_by_token(name):
    """diffusers' processors, with their mask for every token. Yields the masks, by blocks."""
    module: Any = importlib.import_module(f"diffusers.models.transformers.{MODULES[name]}")
    upstream, masks = module.dispatch_attention_fn, []

    def attention(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None:
            masks.append(attn_mask.to_dense().bool())
            attn_mask = masks[-1].repeat_interleave(64, dim=-2).repeat_interleave(64, dim=-1)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask).transpose(1, 2)

    module.dispatch_attention_fn = attention
    try:
        yield masks
    finally:
        module.dispatch_attention_fn = upstream


@contextlib.contextmanager
def never_bfloat16():
    """Kandinsky 5 rounds what it has rotated to bfloat16, which makes much of the smallest difference."""
    real = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        return real(tensor, *(tensor.dtype if each == torch.bfloat16 else each for each in args), **kwargs)

    torch.Tensor.to = to
    try:
        yield
    finally:
        torch.Tensor.to = real


@contextlib.contextmanager
def native_for_flex():
    """Kandinsky 6 SR asks for flex by name, which has neither float64 nor, on a CPU, gradients."""
    upstream, entry_points._FLEX = entry_points._FLEX, ProviderChoice.of("native")
    try:
        yield
    finally:
        entry_points._FLEX = upstream


@functools.cache
def alone(name):
    with token_by_token(name) as masks:
        result = run(build(name), inputs(name))
    for mask in masks:  # else the choice would say nothing, or the same for all
        assert 0.2 < mask.double().mean() < 0.9 and not torch.equal(mask[:, 0], mask[:, 1])
    return result


def compare(meshes, ring, ulysses, rotate_method, name, disabled=False, checkpointing=False):
    """Relative errors of the output, and of the mean of gradients over ranks, with native in float64."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    expected, expected_grad = alone(name)
    model = build(name)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    apply_context_parallel(model, mesh)
    set_attention_provider(model, "native")
    with native_for_flex(), without_exchange() if disabled else contextlib.nullcontext():
        found, grad = run(model, inputs(name))
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    remove_context_parallel(model)
    return [error(found, expected), error(grad, expected_grad)]


@torch.no_grad()
def compare_flex(meshes, ring, ulysses, rotate_method, name, provider):
    """The relative error of the output, through BlockMasks, in float32."""
    model, given = build(name, torch.float32), inputs(name, torch.float32)
    with never_bfloat16():
        with token_by_token(name):
            expected = model(**given).sample
        apply_context_parallel(model, meshes(ring, ulysses, rotate_method=rotate_method))
        set_attention_provider(model, provider)
        return error(model(**given).sample, expected)


def refusal(meshes, ring, ulysses, name, provider, frames):
    """What the forward, in training, is refused with."""
    model = build(name, torch.float32)
    apply_context_parallel(model, meshes(ring, ulysses))
    if provider is not None:
        set_attention_provider(model, provider)
    try:
        model(**inputs(name, torch.float32, frames))
    except AttentionProviderError as problem:
        return str(problem)
    return "nothing"


def compiled(meshes, ring, ulysses, name, provider):
    """How many graphs two blocks make, and relative differences to eager mode: of the output, and, with native, which
    has them on a CPU, of gradients."""
    model, given = build(name, torch.float32), inputs(name, torch.float32)
    apply_context_parallel(model, meshes(ring, ulysses))
    set_attention_provider(model, provider)
    gradients, results = provider == "native", []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with never_bfloat16(), native_for_flex() if gradients else torch.no_grad():
        for compiles in (False, True):
            if compiles:
                for block in model.visual_transformer_blocks:
                    block.compile(backend=counter, fullgraph=True, dynamic=False)
            out = model(**given).sample
            results.append([out.detach()])
            if gradients:
                parameters = list(model.visual_transformer_blocks.parameters())
                grads = torch.autograd.grad(out.square().mean(), parameters)
                results[-1] += [torch.cat([each.flatten() for each in grads])]
    torch._dynamo.reset()
    return counter.frame_count, [error(found, expected) for expected, found in zip(*results)]


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
