"""Families that `test_parallel_runs` does not train: one process trains like two that share each sequence by a ring, or
the batch of a UNet. The pipeline loads the adapter."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers.utils import is_torchvision_available

from diffusers_attn.training.model.lora import loads_adapters

from ..data.media import picture
from ..pipelines import small_references
from ..runs import FROM_IMAGE, QUICK, SETTINGS, WITH_REFERENCES, make_controls, make_references, train_all
from ..worlds import World

OTHERS = [name for name in SETTINGS if name not in QUICK]

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def pictures(settings, adapter):
    """What the model draws, in three steps, before and after it loads the adapter."""
    pipeline = DiffusionPipeline.from_pretrained(settings["model"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = {
        "height": settings["resolution"][0],
        "width": settings["resolution"][0],
        "num_frames": settings.get("num_frames", [1])[0],
        "max_sequence_length": settings.get("max_sequence_length"),
        "num_inference_steps": 3,
        "output_type": "latent",
        **dict.fromkeys(("image", "control_image", "reference_images"), Image.new("RGB", (48, 48), "red")),
    }
    arguments |= {"max_area": settings["resolution"][0] ** 2, "_auto_resize": False}
    arguments = {key: each for key, each in arguments.items() if key in accepted and each is not None}

    def draw():
        with small_references():
            return pipeline(prompt="number 1", **arguments, generator=torch.Generator().manual_seed(0))[0]

    before = draw()
    if loads_adapters(type(pipeline)):
        second = {"load_into_transformer_2": True} if settings.get("expert") == "low" else {}
        pipeline.load_lora_weights(adapter, **second)
    else:
        pipeline.transformer.load_lora_adapter(adapter)
    return before, draw()


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_train_like_one(name, run_worlds, settings_of, tmp_path):
    if name in ("wan_i2v", "wan_ti2v"):
        pytest.importorskip("ftfy", reason="diffusers' pipelines of Wan from an image need ftfy")
    if name.startswith("qwen_image_edit") and not is_torchvision_available():
        pytest.skip("transformers' Qwen2VLProcessor needs torchvision")
    split = {"batch_size": 1} if name.startswith("sdxl") else {"cp_degree": 2, "ring_degree": 2}
    few = {"steps": 2, "batch_size": 2, "lr_warmup_steps": 0, "caption_dropout": 0.3}
    few["evaluation_every"] = 2
    samples = {"validation_prompts": ["a cat"], "validation_every": 1, "validation_steps": 2}
    if name in FROM_IMAGE:
        picture(tmp_path / "first.png", width=48, height=48, seed=0)
        samples["validation_images"] = [str(tmp_path / "first.png")] * WITH_REFERENCES.get(name, 1)
    if name in WITH_REFERENCES:
        kind = "control" if name == "flux_control" else "references"
        size = {"width": 24, "height": 24} if kind == "control" else {}  # a control has the shape of its example
        few[kind] = str(make_references(tmp_path / kind, WITH_REFERENCES[name], **size))
    if name == "wan_vace":
        few |= make_controls(tmp_path)
    one, two = settings_of(name, **few, **samples), settings_of(name, **{**few, **split})
    [[alone]], together = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_all, {"several": [two]}))
    assert len({step["loss"] for step in alone["steps"]}) == 2
    for [of_rank] in together:
        for ours, theirs in zip(of_rank["steps"], alone["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
    before, after = pictures(one, alone["path"])
    assert not torch.allclose(torch.as_tensor(before), torch.as_tensor(after), atol=1e-3)
