"""Tiny models of diffusers under their plans, against one process: outputs, and gradients of all parameters.

Attention is caught where these models' ends, at F.scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import attention_dispatch
from diffusers_attn.context_parallel import exchange
from diffusers_attn.context_parallel.hooks import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sharding import Shards, gather
from diffusers_attn.cp_plans.plan import CPInput, CPOutput, ParamId
from tests.zoo.case import VIDEO_TOKENS, Draw

# The plan of the specification's example, with Wan's rope as it is now: it splits the text too, and names no streams.
WAN_EXAMPLE = {
    "rope": {ParamId(index=0): CPInput(1, 4, split_output=True), ParamId(index=1): CPInput(1, 4, split_output=True)},
    "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},
    "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
    "proj_out": [CPOutput(1, 3)],
}
# What is before the comma names a case of the zoo, and the whole, in VARIANTS below, what is changed about it.
MODELS = {
    "flux": None,
    "flux, two words": None,
    "wan": None,
    "wan_i2v": None,
    "wan, one time": None,
    "cogvideox": None,
    "cogview4": None,
    "wan, example": WAN_EXAMPLE,
    "chronoedit": None,
    "chronoedit, image and times": None,
    "flux2": None,
    "flux2, flat ids": None,
    "helios": None,
    "helios_amplified": None,
    "helios, without history": None,
    "helios, one time and text for all": None,
    "ltx": None,
    "ltx, times": None,
    "ltx2": None,
    "ltx2, times": None,
    "ltx2, guided": None,
    "ltx2_masked": None,
    "minimax_h3": None,
    "ltx2, two of each": None,
    "qwenimage": None,
    "qwenimage, two words": None,
    "qwenimage, edit with control": None,
}
MESHES = {
    **{f"ulysses {size}": (1, size, "allgather") for size in (2, 3, 4)},
    **{f"gather {size}": (size, 1, "allgather") for size in (2, 3, 4)},
    **{f"ring {size}": (size, 1, "alltoall") for size in (2, 3, 4)},
    "gather 2 x ulysses 2": (2, 2, "allgather"),
    "ring 2 x ulysses 2": (2, 2, "alltoall"),
}
# Variants differ in what is split, and hardly in how it is exchanged.
WITH_VARIANTS = ("gather 2", "ulysses 3", "ring 3", "gather 2 x ulysses 2")


def two_words(inputs, draw):
    """Fewer tokens than there are ranks."""
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :2]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:2]
    if "encoder_hidden_states_mask" in inputs:
        inputs["encoder_hidden_states_mask"] = draw.mask((1, 2), 2)


def two_of_each(inputs, draw):
    audio_times(inputs, draw)
    for name in ("hidden_states", "timestep", "audio_hidden_states", "audio_timestep"):
        inputs[name] = inputs[name][:, -2:]
    inputs |= {"num_frames": 1, "height": 1, "width": 2, "audio_num_frames": 2}


def times(inputs, draw):
    """One for every token, as where some frames are given."""
    inputs["timestep"] = draw.steps()[:, None] * (1 - draw.mask((35, 100), VIDEO_TOKENS).to(draw.dtype))


def one_time(inputs, draw):
    """Of the form of one for every token."""
    inputs["timestep"] = draw.steps()[:, None]


def image_and_times(inputs, draw):
    times(inputs, draw)
    inputs["hidden_states"] = draw.normal(2, 12, *inputs["hidden_states"].shape[2:])
    inputs["encoder_hidden_states"] = draw.normal(2, 512, 32)
    inputs["encoder_hidden_states_image"] = draw.normal(2, 17, 24)


def flat_ids(inputs, draw):
    for name in ("img_ids", "txt_ids"):
        inputs[name] = inputs[name][0]


def without_history(inputs, draw):
    for name in [name for name in inputs if "history" in name]:
        del inputs[name]


def audio_times(inputs, draw):
    times(inputs, draw)
    inputs["audio_timestep"] = draw.steps()[:, None] * (1 - draw.mask((3, 9), 23).to(draw.dtype))


def guided(inputs, draw):
    """LTX 2 with all that later versions of it have."""
    audio_times(inputs, draw)
    inputs |= {
        "sigma": draw.steps(),
        "audio_sigma": draw.steps() / 2,
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": draw.floats(1, 0),
        "video_keyframes_mask": draw.mask((35, 100), VIDEO_TOKENS)[..., None].to(draw.dtype),
    }


def edit_with_control(inputs, draw):
    """A picture of 5 by 5 tokens beside one of 5 by 2 that is given."""
    inputs["img_shapes"] = [[(1, 5, 5), (1, 5, 2)]] * 2
    inputs["controlnet_block_samples"] = [draw.normal(2, 35, 64), draw.normal(2, 35, 64)]
    del inputs["encoder_hidden_states_mask"]


# Changes to a case's configuration and to its inputs.
VARIANTS = {
    "flux, two words": ({}, two_words),
    "qwenimage, two words": ({}, two_words),
    "ltx2, two of each": ({"rope_type": "split"}, two_of_each),
    "wan, one time": ({}, one_time),
    "chronoedit, image and times": ({"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 64}, image_and_times),
    "flux2, flat ids": ({}, flat_ids),
    "helios, without history": ({}, without_history),
    "helios, one time and text for all": ({"zero_history_timestep": False, "guidance_cross_attn": False}, None),
    "ltx, times": ({}, times),
    "ltx2, times": ({}, audio_times),
    "ltx2, guided": (
        {
            "perturbed_attn": True,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "use_keyframes_abs_pos_embedding": True,
        },
        guided,
    ),
    "qwenimage, edit with control": ({"zero_cond_t": True, "use_layer3d_rope": True}, edit_with_control),
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
    real = torch.Tensor.float, torch.Tensor.to

    def to(tensor, *args, **kwargs):
        return real[1](tensor, *(torch.float64 if each is torch.float32 else each for each in args), **kwargs)

    torch.Tensor.float, torch.Tensor.to = torch.Tensor.double, to
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = real


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


def compare(meshes, ring, ulysses, rotate_method, name, plan, checkpointing=False, disabled=False, removal=False):
    """Relative errors of the output, and of the mean of gradients over ranks. `removal`: that it restores all, too."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    model = build(name)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()

    expected, expected_grad = alone(name)
    apply_context_parallel(model, mesh, plan)
    with attention_over_ranks(), without_exchange() if disabled else contextlib.nullcontext():
        found, grad = run(model, inputs(name))
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    remove_context_parallel(model)
    if removal:
        again, again_grad = run(model, inputs(name))
        assert torch.equal(again, expected) and torch.equal(again_grad, expected_grad), f"{name}: not as before"
    return [((one - other).norm() / other.norm()).item() for one, other in ((found, expected), (grad, expected_grad))]


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
    assert not wrong


@pytest.mark.parametrize("mesh", MESHES)
def test_like_one_process(pool, mesh):
    models = {name: plan for name, plan in MODELS.items() if "," not in name or mesh in WITH_VARIANTS}
    check(pool, mesh, models=models, removal=mesh == "gather 2")


def test_with_gradient_checkpointing(pool):
    names = ["flux", "wan", "flux2", "helios_amplified", "ltx", "ltx2, guided", "minimax_h3", "qwenimage"]
    check(pool, "gather 2", models=dict.fromkeys(names), checkpointing=True)


def with_lora(meshes, target):
    """Relative errors of a model to which LoRA is added after its plan was applied, and from which it is unloaded."""
    import peft

    adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0", target], init_lora_weights=False)
    errors = []
    models = [build("flux") for _ in range(2)]
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


@pytest.mark.parametrize(("scope", "name"), [("regional", "flux"), ("full", "wan")])
def test_compiled_without_graph_breaks(pool, scope, name):
    arguments = {"ring": 2, "ulysses": 1, "rotate_method": "allgather", "names": [name], "scope": scope}
    for errors in pool.run(2, compiled, **arguments):
        graphs, out, grad = errors[name]
        assert out < 1e-5 and grad < 1e-5
        assert graphs <= (1 if scope == "full" else 3)  # of four blocks, those of one kind share theirs


def test_the_comparison_notices_a_missing_exchange(pool):
    for name, errors in errors_of(pool, "gather 2", MODELS, disabled=True).items():
        assert min(map(min, errors)) > 1e-3, name
