"""A video that is refined window after window over several ranks, with keys of earlier windows in a cache."""

from __future__ import annotations

import pytest
import torch

from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel

from ..models import MESHES, attention_over_ranks, build, float64_throughout, inputs

NAME = "sana_wm_refiner"


@torch.no_grad()
@float64_throughout()
def refined(model):
    """As the pipeline does it: a sink, then windows that attend to it and to those before, the last of two tokens."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    cache, given, results = SanaWMRefinerKVCache(len(model.transformer_blocks)), inputs(NAME), []

    def run(start, stop, mode):
        window = {name: given[name][:, start:stop] for name in ("hidden_states", "timestep")}
        window["video_rotary_emb"] = tuple(part[:, start:stop] for part in given["video_rotary_emb"])
        out = model(**given | window, kv_cache=cache, kv_cache_mode=mode).sample
        results.append(out.flatten())
        return window

    cache.sink_pe = run(0, 40, "capture_pre_rope")["video_rotary_emb"]
    for layer in cache.layer_caches:
        layer.store_sink(*layer.get_captured_pre_rope())
    run(40, 101, "inject_and_capture_post_rope")
    for layer in cache.layer_caches:
        layer.store_history(*layer.get_captured_post_rope())
        results += [each.flatten() for each in layer.get_history()]
    run(101, 103, "inject")
    return torch.cat(results)


def over_ranks(meshes, ring, ulysses, rotate_method):
    model = build(NAME)
    expected = refined(model)
    apply_context_parallel(model, meshes(ring, ulysses, rotate_method=rotate_method))
    with attention_over_ranks():
        found = refined(model)
    remove_context_parallel(model)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mesh", ["gather 2", "ulysses 3", "ring 3", "gather 2 x ulysses 2"])
def test_windows_are_those_of_one_process(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    errors = pool.run(ring * ulysses, over_ranks, ring=ring, ulysses=ulysses, rotate_method=method)
    assert max(errors) < 1e-10
