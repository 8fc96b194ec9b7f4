"""Runs with a UNet: a loop of diffusers and PEFT, offloaded blocks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file

from diffusers_attn.errors import AttentionProviderError
from diffusers_attn.training import TrainConfig
from diffusers_attn.training.families import family_of
from diffusers_attn.training.loop.checks import check_split
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.loss import sample_u

from ...marks import thorough_but
from ..pipelines import make
from ..plain import RUN as PLAIN
from ..plain import cached_sample, plain_loop
from ..runs import train
from ..worlds import forget_accelerate

RUN = {**PLAIN, "steps": 3}


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def expected(trainer):
    """The same run with diffusers' DDPM and its weights of the loss."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(trainer.config.model, dtype=torch.float32)
    unet, schedule = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)

    def loss(_, examples, random):
        clean = cached_sample(examples, random)[:, :, 0] * 0.4
        noise = random.normal("noise", (*clean.shape[1:2], 1, *clean.shape[2:]))[:, :, 0]
        timesteps = (sample_u("uniform", random.generators("level")) * 1000).long()
        texts = [pipeline.encode_prompt(each.example.caption, do_classifier_free_guidance=False) for each in examples]
        embeds, _, pooled, _ = (each if each[0] is None else torch.cat(each) for each in zip(*texts))
        sizes = {"text_embeds": pooled, "time_ids": torch.tensor([[48, 48, 0, 0, 48, 48]] * 2).float()}
        noisy = schedule.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, embeds, added_cond_kwargs=sizes, return_dict=False)[0]
        if schedule.config.prediction_type == "epsilon":
            return (predicted - noise).square().mean()
        snr = compute_snr(schedule, timesteps)
        weights = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
        errors = (predicted - schedule.get_velocity(clean, noise, timesteps)).square().mean((1, 2, 3))
        return (errors * weights).mean()

    losses, weights = plain_loop(trainer, {"unet": unet}, loss)
    return losses, weights["unet"]


@pytest.mark.parametrize("name", thorough_but(["sdxl_v"], ["sdxl", "sdxl_v"]))
def test_it_is_a_plain_loop(name, settings_of):
    """Of a UNet that predicts v, with min-SNR."""
    steps = []
    settings = settings_of(name, **RUN)
    trainer = Trainer(TrainConfig(**settings), on_step=lambda _, numbers: steps.append(numbers["loss"]))
    found = load_file(trainer.run())
    losses, weights = expected(trainer)
    assert steps == pytest.approx(losses, rel=1e-6)
    assert {f"unet.{name}" for name in weights} == set(found)
    assert all(torch.allclose(found[f"unet.{name}"], each, atol=1e-6) for name, each in weights.items())


def test_a_unet_is_not_split():
    family = family_of(make("sdxl"))
    check_split(family, 1)
    with pytest.raises(AttentionProviderError, match="UNet2DConditionModel.*need the entire image"):
        check_split(family, 2)


def test_a_run_goes_on_from_the_adapter_of_another(settings_of):
    first = settings_of("sdxl", **{**RUN, "steps": 1})
    before = load_file(train(first)["path"])
    forget_accelerate()
    again = {"steps": 1, "learning_rate": 1e-30, "init_adapter": first["output_dir"], "adapter_init": "default"}
    after = load_file(train(settings_of("sdxl", **{**RUN, **again}))["path"])
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], each, atol=1e-6) for name, each in before.items())


@pytest.mark.thorough
@pytest.mark.parametrize("offload", ["blocks", "disk"])
def test_offloaded_blocks_train_alike(settings_of, offload):
    plain = train(settings_of("sdxl", **RUN))
    forget_accelerate()
    assert train(settings_of("sdxl", **RUN, offload=offload))["steps"] == plain["steps"]
