"""Tiny models of diffusers under their plans, against one process: outputs, and gradients of all parameters.

Attention is caught where these models' ends, at F.scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import attention_dispatch
from diffusers_attn.context_parallel import exchange
from diffusers_attn.context_parallel.hooks import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sharding import Shards, gather
from diffusers_attn.cp_plans.plan import CPInput, CPOutput, ParamId

# The plan of the specification's example, with Wan's rope as it is now: it splits the text too, and names no streams.
WAN_EXAMPLE = {
    "rope": {ParamId(index=0): CPInput(1, 4, split_output=True), ParamId(index=1): CPInput(1, 4, split_output=True)},
    "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},
    "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
    "proj_out": [CPOutput(1, 3)],
}
MODELS = {
    "flux": None,
    "flux, two words": None,
    "wan": None,
    "wan_i2v": None,
    "cogvideox": None,
    "cogview4": None,
    "wan, example": WAN_EXAMPLE,
}
TEXT = {"flux, two words": 2}  # tokens of text, where a case is to have fewer than there are ranks
MESHES = {
    "ulysses 2": (1, 2, "allgather"),
    "gather 2": (2, 1, "allgather"),
    "ring 3": (3, 1, "alltoall"),
    "ulysses 3": (1, 3, "allgather"),
    "unified 2x2": (2, 2, "allgather"),
}


@contextlib.contextmanager
def attention_over_ranks():
    """As code does that knows nothing of this library: by putting attention_dispatch in SDPA's place."""
    local = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention_dispatch
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = local


@contextlib.contextmanager
def float64_throughout():
    """Models compute some things in float32 whatever their dtype, which would hide differences below 1e-7."""
    real = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = real


@float64_throughout()
def run(model, inputs):
    """Output, and the gradients of a loss that every element of it takes part in."""
    from tests.zoo import outputs

    (out,) = outputs(model(**inputs))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    return out.detach(), torch.cat(
        [(grad if grad is not None else p * 0).flatten() for grad, p in zip(grads, parameters)]
    )


def inputs(name, dtype=torch.float64):
    from tests.zoo import CASES

    drawn = CASES[name.partition(",")[0]].inputs(dtype=dtype)
    if name in TEXT:
        drawn["encoder_hidden_states"] = drawn["encoder_hidden_states"][:, : TEXT[name]]
        drawn["txt_ids"] = drawn["txt_ids"][: TEXT[name]]
    return drawn


def compare(meshes, ring, ulysses, rotate_method, models, checkpointing=False, disabled=False):
    """Relative errors (output, gradients averaged over ranks) of every model, and whether removal restores it."""
    from tests.zoo import CASES

    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    errors = {}
    for name, plan in models.items():
        case = CASES[name.partition(",")[0]]
        model = case.build(dtype=torch.float64).double()  # also what a class keeps in float32
        if checkpointing:
            model.train()
            model.enable_gradient_checkpointing()

        expected, expected_grad = run(model, inputs(name))
        apply_context_parallel(model, mesh, plan)
        with attention_over_ranks(), without_exchange() if disabled else contextlib.nullcontext():
            found, grad = run(model, inputs(name))
        grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
        remove_context_parallel(model)
        again, again_grad = run(model, inputs(name))
        assert torch.equal(again, expected) and torch.equal(again_grad, expected_grad), f"{name}: not as before"
        errors[name] = [
            ((one - other).norm() / other.norm()).item() for one, other in ((found, expected), (grad, expected_grad))
        ]
    return errors


@contextlib.contextmanager
def without_exchange():
    """What each rank receives is made of its own data."""
    real = exchange.start_all_to_all, exchange.wait

    def keep(tensor, send, receive, group):
        return tensor[:1].expand(sum(receive), *tensor.shape[1:]).contiguous()

    exchange.start_all_to_all, exchange.wait = keep, lambda tensor, group: tensor
    try:
        yield
    finally:
        exchange.start_all_to_all, exchange.wait = real


def check(pool, mesh, tolerance=1e-10, **options):
    ring, ulysses, method = MESHES[mesh]
    answers = pool.run(ring * ulysses, compare, ring=ring, ulysses=ulysses, rotate_method=method, **options)
    for rank, errors in enumerate(answers):
        wrong = {name: error for name, error in errors.items() if not max(error) < tolerance}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("mesh", MESHES)
def test_like_one_process(pool, mesh):
    check(pool, mesh, models=MODELS)


def test_with_gradient_checkpointing(pool):
    check(pool, "gather 2", models={"flux": None, "wan": None}, checkpointing=True)


def with_lora(meshes, target):
    """Relative errors of a model to which LoRA is added after its plan was applied, and from which it is unloaded."""
    import peft

    from tests.zoo import CASES

    adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0", target], init_lora_weights=False)
    errors = []
    models = [CASES["flux"].build(dtype=torch.float64).double() for _ in range(2)]
    streams = apply_context_parallel(models[1], meshes(2, 1))
    for change in ("add", "unload"):
        results = []
        for model in models:
            torch.manual_seed(1)
            model.add_adapter(adapter) if change == "add" else model.unload_lora()
            model.requires_grad_()
            with attention_over_ranks() if model is models[1] else contextlib.nullcontext():
                results.append(run(model, inputs("flux")))
        (expected, expected_grad), (found, grad) = results
        grad = gather(grad[None], Shards.contiguous(2, 2), 0, streams.mesh).mean(dim=0)
        errors += [((found - expected).norm() / expected.norm()).item()]
        errors += [((grad - expected_grad).norm() / expected_grad.norm()).item()]
    return errors


def test_with_lora_added_and_unloaded_after(pool):
    for errors in pool.run(2, with_lora, target="proj_out"):
        assert max(errors) < 1e-10


def compiled(meshes, ring, ulysses, rotate_method, names, scope):
    """The number of graphs, and relative differences to eager mode of output and gradients."""
    from tests.zoo import CASES

    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    errors = {}
    for name in names:
        model = CASES[name].build()
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


@pytest.mark.parametrize(("scope", "name"), [("regional", "flux"), ("full", "wan")])
def test_compiled_without_graph_breaks(pool, scope, name):
    arguments = {"ring": 2, "ulysses": 1, "rotate_method": "allgather", "names": [name], "scope": scope}
    for errors in pool.run(2, compiled, **arguments):
        graphs, out, grad = errors[name]
        assert out < 1e-5 and grad < 1e-5
        assert graphs <= (1 if scope == "full" else 4)  # Flux has four blocks


def test_the_comparison_notices_a_missing_exchange(pool):
    answers = pool.run(
        2, compare, ring=2, ulysses=1, rotate_method="allgather", models={"flux": None, "wan": None}, disabled=True
    )
    for name in ("flux", "wan"):
        assert min(min(errors[name]) for errors in answers) > 1e-3
