"""Every model that has a plan, under it; see `models.py` for how they are compared."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.cp_plans.registry import get_cp_plan

from ..context_parallel.model_cases import COMPARED, FAMILIES
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
from ..marks import thorough_but
from ..zoo import CASES

MORE = ("gather 3", "ring 2")
MORE_OF_SHIPPED = ("ulysses 4", "gather 4", "ring 4", "ring 2 x ulysses 2")
FAMILIES_AND_MESHES = [
    (family, mesh) for family in FAMILIES for mesh in DISTINCT + MORE + (MORE_OF_SHIPPED if family == "shipped" else ())
]


# Every model is compared with its tokens on two ranks. How shards are exchanged on other meshes does not depend on the
# model but on the words of its plan, so on them these are compared, which have all words.
REPRESENTATIVES = (
    "flux, two words",  # joined with a text of fewer tokens than ranks
    "wan",  # cross-attention
    "ltx2_masked",  # two sequences with masks
    "helios_amplified",  # CPLength
    "glm_image",  # CPStore
    "nucleus_moe, experts choose",  # CPGatherInput
    "sana_wm, camera",  # CPHalo and CPHeads
    "lumina_next, larger than in training",  # CPLogBase
    "transformer_2d",  # CPRequired
)
WORDS_WITH_TESTS_OF_THEIR_OWN = {
    "CPBlocks": "test_nabla.py",
    "CPCache": "test_anyflow_far.py",
    "CPForbidden": "REFUSED",
}


@pytest.mark.parametrize("mesh", [*(mesh for mesh in DISTINCT if mesh != "gather 2"), "ring 2 x ulysses 2"])
def test_representatives_on_other_meshes(pool, mesh):
    check(pool, mesh, models=dict.fromkeys(REPRESENTATIVES))


def words(plan):
    """The names of the plan words in a plan, or in a part of one."""
    if isinstance(plan, dict):
        return set().union(*map(words, plan.values()))
    if isinstance(plan, list | tuple):
        return set().union(*map(words, plan))
    return set() if plan is None else {type(plan).__name__}


def test_representatives_have_all_plan_words():
    of_models = {
        name: words(get_cp_plan(CASES[name].build()))
        for name in {name.partition(",")[0] for family in COMPARED.values() for name in family.MODELS}
    }
    found = {word for name in REPRESENTATIVES for word in of_models[name.partition(",")[0]]}
    assert set().union(*of_models.values()) == found | set(WORDS_WITH_TESTS_OF_THEIR_OWN)


@pytest.mark.parametrize(("family", "mesh"), thorough_but(lambda case: case[1] == "gather 2", FAMILIES_AND_MESHES))
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
            expected = inspect.unwrap(run)(model, inputs(name, torch.float32))
            if scope == "full":
                model.compile(backend=counter, fullgraph=True, dynamic=False)
            else:
                for blocks in (each for each in model.children() if isinstance(each, torch.nn.ModuleList)):
                    for block in blocks:
                        block.compile(backend=counter, fullgraph=True, dynamic=False)
            found = inspect.unwrap(run)(model, inputs(name, torch.float32))
        torch._dynamo.reset()
        errors[name] = counter.frame_count, *(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected))
    return errors


@pytest.mark.parametrize(  # a whole model with this mesh is compiled in tests/parallelize/test_enable.py, too
    ("scope", "name"),
    [pytest.param("regional", "flux", marks=pytest.mark.slow), pytest.param("full", "wan", marks=pytest.mark.thorough)],
)
def test_compiled_without_graph_breaks(pool, scope, name):
    arguments = {"ring": 2, "ulysses": 1, "rotate_method": "allgather", "names": [name], "scope": scope}
    for errors in pool.run(2, compiled, **arguments):
        graphs, out, grad = errors[name]
        assert out < 1e-5 and grad < 1e-5
        assert graphs <= (1 if scope == "full" else 3)  # of four blocks, those of one kind share theirs


@pytest.mark.parametrize("family", thorough_but(["shipped"], FAMILIES))
def test_the_comparison_notices_a_missing_exchange(pool, family):
    for name, errors in errors_of(pool, "gather 2", FAMILIES[family].MODELS, disabled=True).items():
        assert min(map(min, errors)) > 1e-3, name
