"""Every model that has a plan, under it; see `models.py` for how they are compared."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather

from ..context_parallel.model_cases import FAMILIES
from ..context_parallel.models import (
    DISTINCT,
    WITH_VARIANTS,
    attention_over_ranks,
    build,
    check,
    errors_of,
    inputs,
    run,
)
from ..marks import slow_but

MORE = ("gather 3", "ring 2")
MORE_OF_SHIPPED = ("ulysses 4", "gather 4", "ring 4", "ring 2 x ulysses 2")
FAMILIES_AND_MESHES = [
    (family, mesh) for family in FAMILIES for mesh in DISTINCT + MORE + (MORE_OF_SHIPPED if family == "shipped" else ())
]


def _quick(case):
    """Tokens on two ranks for every model; heads, and both, for those of the first releases."""
    family, mesh = case
    return mesh == "gather 2" or (family == "shipped" and mesh in ("ulysses 2", "gather 2 x ulysses 2"))


@pytest.mark.parametrize(("family", "mesh"), slow_but(_quick, FAMILIES_AND_MESHES))
def test_like_one_process(pool, family, mesh):
    models = FAMILIES[family].MODELS
    models = {name: plan for name, plan in models.items() if "," not in name or mesh in WITH_VARIANTS}
    check(pool, mesh, models=models, removal=mesh == "gather 2")


def test_with_gradient_checkpointing(pool):
    names = ["flux", "wan", "flux2", "helios_amplified", "ltx", "ltx2, guided", "minimax_h3", "qwenimage"]
    check(pool, "gather 2", models=dict.fromkeys(names), checkpointing=True)


def with_lora(meshes, name, targets):
    """Relative errors of a model to which LoRA is added after its plan was applied, and from which it is unloaded."""
    import peft

    adapter = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    errors = []
    models = [build(name) for _ in range(2)]
    tracker = apply_context_parallel(models[1], meshes(2, 1))
    for change in ("add", "unload"):
        results = []
        for model in models:
            torch.manual_seed(1)
            model.add_adapter(adapter) if change == "add" else model.unload_lora()
            model.requires_grad_()
            with attention_over_ranks() if model is models[1] else contextlib.nullcontext():
                results.append(run(model, inputs(name)))
        (expected, expected_grad), (found, grad) = results
        grad = gather(grad[None], Shards.contiguous(2, 2), 0, tracker.mesh).mean(dim=0)
        errors += [((found - expected).norm() / expected.norm()).item()]
        errors += [((grad - expected_grad).norm() / expected_grad.norm()).item()]
    return errors


# Modules that are gathered, and that are given their neighbours' edges.
@pytest.mark.parametrize(
    ("name", "targets"), [("flux", ["to_q", "to_out.0", "proj_out"]), ("sana_video", ["to_k", "to_out.0", "conv_temp"])]
)
def test_with_lora_added_and_unloaded_after(pool, name, targets):
    for errors in pool.run(2, with_lora, name=name, targets=targets):
        assert max(errors) < 1e-10


def compiled(meshes, ring, ulysses, rotate_method, names, scope):
    """The number of graphs, and relative differences to eager mode of output and gradients."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    errors = {}
    for name in names:
        model = build(name, torch.float32)
        apply_context_parallel(model, mesh)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        with attention_over_ranks():
            expected = run.__wrapped__(model, inputs(name, torch.float32))
            if scope == "full":
                model.compile(backend=counter, fullgraph=True, dynamic=False)
            else:
                for blocks in (each for each in model.children() if isinstance(each, torch.nn.ModuleList)):
                    for block in blocks:
                        block.compile(backend=counter, fullgraph=True, dynamic=False)
            found = run.__wrapped__(model, inputs(name, torch.float32))
        torch._dynamo.reset()
        errors[name] = counter.frame_count, *(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected))
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "name"), [("regional", "flux"), ("full", "wan")])
def test_compiled_without_graph_breaks(pool, scope, name):
    arguments = {"ring": 2, "ulysses": 1, "rotate_method": "allgather", "names": [name], "scope": scope}
    for errors in pool.run(2, compiled, **arguments):
        graphs, out, grad = errors[name]
        assert out < 1e-5 and grad < 1e-5
        assert graphs <= (1 if scope == "full" else 3)  # of four blocks, those of one kind share theirs


@pytest.mark.parametrize("family", slow_but(["shipped"], FAMILIES))
def test_the_comparison_notices_a_missing_exchange(pool, family):
    for name, errors in errors_of(pool, "gather 2", FAMILIES[family].MODELS, disabled=True).items():
        assert min(map(min, errors)) > 1e-3, name
