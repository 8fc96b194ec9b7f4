"""Modes of image models that take more than one forward, other processors, or are refused."""

import inspect

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.tiny_models.case import Draw
from tests.zoo import CASES

from ..context_parallel.models import MESHES, attention_over_ranks, build, check, float64_throughout, inputs, run
from .test_models import compiled


def with_ip_adapter(model):
    """Two adapters, in the double blocks. What they add is of the size of the rest."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(1)
    for block in model.transformer_blocks:
        adapter = FluxIPAdapterAttnProcessor(64, 24, num_tokens=(4, 5), scale=[0.7, 1.3], dtype=torch.float64)
        for weight in adapter.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        block.attn.set_processor(adapter)

    draw = Draw("cpu", torch.float64, seed=2)
    kwargs = {"ip_hidden_states": [draw.normal(2, 4, 24), draw.normal(2, 5, 24)]}
    return run(model, inputs("flux") | {"joint_attention_kwargs": kwargs})


@float64_throughout()
def with_images_to_edit(model):
    """Keys of two images, one of them smaller, are kept; then a picture is drawn, with their gradients as well."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    drawn, caches = inputs("glm_image"), GlmImageKVCache(num_layers=2)
    del drawn["attention_mask"]
    caches.set_mode("write")
    for rows in (10, 6):
        image = {name: value[:1] for name, value in drawn.items()}
        image["hidden_states"] = image["hidden_states"][:, :, :rows]
        image["prior_token_id"] = image["prior_token_id"][:, : rows // 2 * 7]
        image["encoder_hidden_states"] = image["encoder_hidden_states"][:, :0]
        model(**image, kv_caches=caches)
    assert {each.shape[1] for each in caches[0].k_caches} == {35 + 21}
    caches.set_mode("read")
    return inspect.unwrap(run)(model, drawn | {"kv_caches": caches})


@float64_throughout()
def with_text_kept(model):
    """Keys of the text are those of an earlier step: this rank's of them."""
    from diffusers import TextKVCacheConfig

    drawn, again = inputs("nucleus_moe"), []
    model.enable_cache(TextKVCacheConfig())
    try:
        model(**drawn)
        again += [
            block.encoder_proj.register_forward_hook(lambda *_: pytest.fail("they are computed again"))
            for block in model.transformer_blocks
        ]
        return inspect.unwrap(run)(model, drawn | {"timestep": drawn["timestep"] / 2})
    finally:
        for handle in again:
            handle.remove()
        model.disable_cache()


MODES = {"flux": with_ip_adapter, "glm_image": with_images_to_edit, "nucleus_moe": with_text_kept}


def compare_mode(meshes, ring, ulysses, rotate_method, name):
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    model = build(name)
    expected = MODES[name](model)
    apply_context_parallel(model, mesh)
    with attention_over_ranks():
        out, grad = MODES[name](model)
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    return [((a - b).norm() / b.norm()).item() for a, b in zip((out, grad), expected)]


@pytest.mark.parametrize("mesh", ["ulysses 3", "gather 2", "ring 3"])
@pytest.mark.parametrize("name", MODES)
def test_like_one_process(pool, name, mesh):
    ring, ulysses, method = MESHES[mesh]
    where = {"ring": ring, "ulysses": ulysses, "rotate_method": method}
    for errors in pool.run(ring * ulysses, compare_mode, name=name, **where):
        assert max(errors) < 1e-10


def test_with_gradient_checkpointing(pool):
    """What a block gathers, splits and is rotated by comes anew when it is computed anew."""
    names = ["flux3", "hidream", "nucleus_moe, experts choose", "sd3_dual, control and a layer skipped"]
    check(pool, "gather 2", models=dict.fromkeys(names), checkpointing=True)


@pytest.mark.slow
def test_a_gather_within_a_compiled_block(pool):
    """With fullgraph=True, so that each block is one graph."""
    name = "nucleus_moe, experts choose"
    where = {"ring": 2, "ulysses": 1, "rotate_method": "allgather"}
    for errors in pool.run(2, compiled, names=[name], scope="regional", **where):
        assert max(errors[name][1:]) < 1e-5


REFUSED = {
    "sd3": ({"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.zeros(2, 4, 8)}}, "IP-Adapter"),
    "bria": ({"controlnet_single_block_samples": [torch.zeros(2, 35, 64)]}, "controlnet_block_samples only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_it_runs(name):
    given, message = REFUSED[name]
    case = CASES[name]
    model = case.build()
    apply_context_parallel(model, ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE))
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(AttentionProviderError, match=message):
        model(**case.inputs(), **given)
