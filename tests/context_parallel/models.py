"""Tiny models of diffusers under their plans, against one process: outputs, and gradients of all parameters.

Attention is caught where these models' ends, at F.scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch

from diffusers_attn import attention_dispatch, set_attention_provider
from diffusers_attn.context_parallel.comm import collectives
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.tiny_models.case import Draw

from .model_cases import VARIANTS

MESHES = {
    **{f"ulysses {size}": (1, size, "allgather") for size in (2, 3, 4)},
    **{f"gather {size}": (size, 1, "allgather") for size in (2, 3, 4)},
    **{f"ring {size}": (size, 1, "alltoall") for size in (2, 3, 4)},
    "gather 2 x ulysses 2": (2, 2, "allgather"),
    "ring 2 x ulysses 2": (2, 2, "alltoall"),
}
# What each mesh adds to the others: heads and tokens that are split by two and by three, a ring of more than one step,
# and both axes. Other meshes are more of the same, which a few models show.
DISTINCT = ("ulysses 2", "ulysses 3", "gather 2", "ring 3", "gather 2 x ulysses 2")
# Models that call attention for every sample, unless their processors are bound to a provider.
BOUND = ("mochi",)
# Variants differ in what is split, and hardly in how it is exchanged.
WITH_VARIANTS = ("gather 2", "ulysses 3", "ring 3", "gather 2 x ulysses 2")


@contextlib.contextmanager
def attention_over_ranks():
    """Replaces SDPA by attention_dispatch, as for code that does not use this library."""
    local = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention_dispatch
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = local


@contextlib.contextmanager
def float64_throughout():
    """Models compute some things in float32 or bfloat16 whatever their dtype, which would hide differences."""
    real = torch.Tensor.float, torch.Tensor.to, torch.linalg.vector_norm
    lower = (torch.float32, torch.bfloat16)

    def to(tensor, *args, **kwargs):
        return real[1](tensor, *(torch.float64 if each in lower else each for each in args), **kwargs)

    def norm(tensor, *args, dtype=None, **kwargs):
        return real[2](tensor, *args, **kwargs)

    torch.Tensor.float, torch.Tensor.to, torch.linalg.vector_norm = torch.Tensor.double, to, norm
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to, torch.linalg.vector_norm = real


@float64_throughout()
def run(model, inputs):
    """Output, and the gradients of a loss that every element of it takes part in."""
    from tests.zoo import outputs

    out = torch.cat([each.flatten() for each in outputs(model(**inputs))])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    return out.detach(), torch.cat(
        [(grad if grad is not None else p * 0).flatten() for grad, p in zip(grads, parameters)]
    )


def build(name, dtype=torch.float64):
    from tests.zoo import CASES

    case = CASES[name.partition(",")[0]]
    config, _ = VARIANTS.get(name, ({}, None))
    model = dataclasses.replace(case, config={**case.config, **config}).build(dtype=dtype)
    return model.double() if dtype == torch.float64 else model  # also what a class keeps in float32


def inputs(name, dtype=torch.float64):
    from tests.zoo import CASES

    drawn = CASES[name.partition(",")[0]].inputs(dtype=dtype)
    _, change = VARIANTS.get(name, ({}, None))
    if change is not None:
        change(drawn, Draw("cpu", dtype, seed=1))
    return drawn


@functools.cache
def alone(name):
    """What one process computes. A worker keeps it for the meshes that follow."""
    return run(build(name), inputs(name))


def from_first(mesh, tensor):
    """The tensor of the first rank, on every rank."""
    return gather(tensor[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh)[0]


def compare(meshes, ring, ulysses, rotate_method, name, plan, checkpointing=False, disabled=False, removal=False):
    """Relative errors of the output, and of the mean of gradients over ranks. `removal`: also that the first rank's
    model computes the same as before once the plan is removed."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    model = build(name)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()

    apply_context_parallel(model, mesh, plan)
    if name.partition(",")[0] in BOUND:
        set_attention_provider(model, "native")
    with attention_over_ranks(), without_exchange() if disabled else contextlib.nullcontext():
        found, grad = run(model, inputs(name))
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    remove_context_parallel(model)
    set_attention_provider(model, None)
    # The first rank alone computes it: on every rank it would be the same.
    expected, expected_grad = alone(name) if mesh.rank == 0 else (torch.zeros_like(found), torch.zeros_like(grad))
    if removal and mesh.rank == 0:
        again, again_grad = run(model, inputs(name))
        assert torch.equal(again, expected) and torch.equal(again_grad, expected_grad), f"{name}: not as before"
    expected, expected_grad = (from_first(mesh, each) for each in (expected, expected_grad))
    return [((one - other).norm() / other.norm()).item() for one, other in ((found, expected), (grad, expected_grad))]


@contextlib.contextmanager
def without_exchange():
    """What each rank receives is made of its own data."""
    real = collectives.start_all_to_all, collectives.wait

    def keep(tensor, send, receive, group):
        return tensor[:1].expand(sum(receive), *tensor.shape[1:]).contiguous()

    collectives.start_all_to_all, collectives.wait = keep, lambda tensor, group: tensor
    try:
        yield
    finally:
        collectives.start_all_to_all, collectives.wait = real


def errors_of(pool, mesh, models, **options):
    """Of every model the errors of all ranks. A job for each, so that none takes long on a machine that is busy."""
    ring, ulysses, method = MESHES[mesh]
    where = {"ring": ring, "ulysses": ulysses, "rotate_method": method}
    return {
        name: pool.run(ring * ulysses, compare, name=name, plan=plan, **where, **options)
        for name, plan in models.items()
    }


def check(pool, mesh, models, tolerance=1e-10, **options):
    errors = errors_of(pool, mesh, models, **options)
    wrong = {name: each for name, each in errors.items() if not max(map(max, each)) < tolerance}
    assert not wrong, wrong
