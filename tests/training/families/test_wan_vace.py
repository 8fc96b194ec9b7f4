"""Runs of Wan VACE: a loop of diffusers and PEFT that encodes everything itself, and samples from a control."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig
from diffusers_attn.training.data.decode import read_video
from diffusers_attn.training.data.source import FileSource
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.randomness import generator

from ...marks import thorough_but
from ..pipelines import make
from ..plain import RUN, plain_loop
from ..runs import make_controls
from ..worlds import forget_accelerate

BOUNDARY = 875
"""The timestep from which the pipeline uses the transformer for high noise levels."""
FRAMES, SIZE = 9, 48


def two_experts(folder):
    """Wan 2.2 VACE: a transformer for high and one for low noise levels."""
    pipeline, other = make("wan_vace"), make("wan_vace").transformer
    with torch.no_grad():
        for each in other.parameters():
            each.mul_(0.9)
    pipeline.register_modules(transformer_2=other)
    pipeline.register_to_config(boundary_ratio=BOUNDARY / 1000)
    pipeline.save_pretrained(folder)
    return str(folder)


def frames_of(path, first=0):
    """Frames of a video, or a picture for all of them, as PIL images."""
    if path.suffix == ".png":
        return [Image.open(path).convert("RGB")] * FRAMES
    return [
        Image.fromarray(each.movedim(0, -1).numpy())
        for each in read_video(FileSource(path), range(first, first + FRAMES))
    ]


def expected(trainer):
    """The same run with diffusers: of single files, whose middle frames are trained."""
    config = trainer.config
    pipeline = WanVACEPipeline.from_pretrained(config.model, dtype=torch.float32)
    models = {"high": pipeline.transformer}
    if config.expert == "both":
        models["low"] = pipeline.transformer_2
    vae = pipeline.vae
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))

    def chosen(step):
        u = sample_u("uniform", [generator(config.seed, "train", "expert", step)])
        return "high" if config.expert is None or 1000 * 3 * u / (1 + 2 * u) >= BOUNDARY else "low"

    @torch.no_grad()
    def encoded(example):
        stem = Path(example.name).stem
        first = (example.frames - FRAMES) // 2
        control, mask, references = pipeline.preprocess_conditions(
            video=frames_of(Path(config.control, f"{stem}.mp4"), first),
            mask=frames_of(Path(config.control_mask, f"{stem}.png")),
            reference_images=Image.open(Path(config.references, f"{stem}.png")),
            height=SIZE, width=SIZE, num_frames=FRAMES, dtype=torch.float32,
        )  # fmt: skip
        given = pipeline.prepare_video_latents(control, mask, references, None, torch.device("cpu"))
        given = torch.cat([given, pipeline.prepare_masks(mask, references)], dim=1)
        pixels = np.stack([np.asarray(each) for each in frames_of(Path(config.data, f"{stem}.mp4"), first)])
        video = torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1
        parts = [vae.encode(each).latent_dist for each in (references[0][0][None, :, None], video)]
        moments = [torch.cat([getattr(each, name) for each in parts], dim=2) for name in ("mean", "logvar")]
        text, _ = pipeline.encode_prompt(
            example.caption, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        return (*moments, given, text)

    def loss(expert, examples, random):
        means, logvars, given, text = map(torch.cat, zip(*(encoded(each.example) for each in examples)))
        clean = (means + (0.5 * logvars).exp() * random.normal("posterior", means.shape[1:]) - mean) / std
        noise = random.normal("noise", clean.shape[1:])
        low, high = (0.0, 1.0) if config.expert is None else (0.7, 1.0) if expert == "high" else (0.0, 0.7)
        u = sample_u("uniform", random.generators("level"), levels=(low, high))
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
        [predicted] = models[expert](
            (1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), text, control_hidden_states=given,
            control_hidden_states_scale=torch.ones(2), return_dict=False,
        )  # fmt: skip
        return (predicted - (noise - clean)).square().mean()

    losses, weights = plain_loop(trainer, models, loss, chosen)
    return losses, weights, [chosen(step) for step in range(config.steps)]


@pytest.mark.parametrize("expert", thorough_but(["both"], [None, "both"]))
def test_it_is_a_plain_loop(expert, settings_of, tmp_path):
    """Of one transformer, or of two. Samples before the first step are the pipeline's own, of the control that a file
    of prompts names."""
    given = make_controls(tmp_path)
    prompt = {
        "prompt": "a cat", "seed": 5, "steps": 2, "guidance": 1.0, "frames": FRAMES, "size": [SIZE, SIZE],
        "control": f"{given['control']}/0.mp4", "control_mask": f"{given['control_mask']}/1.png",
        "image": f"{given['references']}/2.png",
    }  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps([prompt]))
    samples = {"validation_prompts": [str(tmp_path / "prompts.json")], "validation_lossless": True}
    settings = settings_of("wan_vace", **RUN, **given, **samples, steps=3, timestep_sampling="uniform", fps=0)
    if expert:
        settings |= {"expert": expert, "model": two_experts(tmp_path / "model")}
    steps = []
    trainer = Trainer(TrainConfig(**settings), on_step=lambda _, numbers: steps.append(numbers["loss"]))
    trainer.run()
    forget_accelerate()
    losses, weights, experts = expected(trainer)
    assert set(experts) == set(weights)
    assert steps == pytest.approx(losses, rel=1e-6)
    output = Path(settings["output_dir"])
    for name, each in weights.items():
        found = load_file((output / name if expert else output) / "pytorch_lora_weights.safetensors")
        assert {f"transformer.{key}" for key in each} == set(found)
        assert all(torch.allclose(found[f"transformer.{key}"], value, atol=1e-6) for key, value in each.items())

    pipeline = WanVACEPipeline.from_pretrained(settings["model"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a cat", video=frames_of(Path(prompt["control"])), mask=frames_of(Path(prompt["control_mask"])),
        reference_images=Image.open(prompt["image"]), height=SIZE, width=SIZE, num_frames=FRAMES,
        num_inference_steps=2, guidance_scale=1.0, max_sequence_length=15,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).frames[0]  # fmt: skip
    folder = output / "samples" / "step-00000000"
    sample = torch.stack(list(read_video(FileSource(folder / "00-a-cat.mkv"), range(FRAMES)))).movedim(1, -1).numpy()
    assert np.abs(sample.astype(float) - (drawn * 255).round()).max() <= 1
    [about] = json.loads((folder / "samples.json").read_text())["samples"]
    assert about["control"] == prompt["control"] and about["control mask"] == prompt["control_mask"]
