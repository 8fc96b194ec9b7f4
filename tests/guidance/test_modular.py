"""Guiders of modular pipelines call the model once per branch: groups of ranks divide their calls as well."""

from __future__ import annotations

import types

import pytest
import torch
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, SkipLayerGuidance

from diffusers_attn import disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.installed import guided_call

from ..tiny_pipelines import make

STEPS = 4
GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=5.0),
    # From the second step on a third call skips a layer, by a hook: all ranks compute it together.
    "skip-layer": lambda: SkipLayerGuidance(
        guidance_scale=5.0,
        skip_layer_config=LayerSkipConfig([0], fqn="blocks"),
        skip_layer_guidance_start=0.3,
        skip_layer_guidance_stop=1.0,
    ),
}


def build(guider):
    from diffusers.modular_pipelines.wan import WanBlocks, encoders

    if not hasattr(encoders, "ftfy"):  # repairs broken text in prompts; there is none here
        encoders.ftfy = types.SimpleNamespace(fix_text=lambda text: text)
    parts = make("wan").components
    pipe = WanBlocks().init_pipeline()
    names = "text_encoder", "tokenizer", "vae", "transformer", "scheduler"
    pipe.update_components(**{name: parts[name] for name in names}, guider=GUIDERS[guider]())
    return pipe


def draw(pipe):
    with torch.no_grad():
        return pipe(
            prompt="a cat", negative_prompt="bad", height=48, width=32, num_frames=5, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0), output_type="pt", output="videos",
        )  # fmt: skip


def divided(meshes, guider):
    expected, pipe = draw(build(guider)), build(guider)
    report = enable_context_parallel(pipe, verbose=False, guidance_degree=2)
    found = []
    for _ in range(2):
        call, before = guided_call(pipe.transformer), guided_call(pipe.transformer).computed
        found.append(((draw(pipe) - expected).abs().max().item(), call.computed - before))
    disable_context_parallel(pipe)
    return report.guidance, found


@pytest.mark.parametrize("guider", GUIDERS)
def test_a_guider(pool, guider):
    for guidance, found in pool.run(4, divided, guider=guider):
        assert "by 2 groups of ranks" in guidance
        assert all(error < 1e-5 for error, _ in found)  # the models are in float32
        assert found[-1][1] == STEPS
