"""Runs with a UNet: a loop of diffusers and PEFT, offloaded blocks, and what is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file

from diffusers_attn.errors import AttentionProviderError
from diffusers_attn.training import TrainConfig
from diffusers_attn.training.data.store import read_tensors
from diffusers_attn.training.families import family_of
from diffusers_attn.training.loop.checks import check_split
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.randomness import SampleRandomness, derived_seed

from ...marks import thorough_but
from ..pipelines import make
from ..runs import train
from ..worlds import forget_accelerate

RUN = {
    # (With a smaller eps, Adam turns the rounding of gradients near zero into whole steps.)
    "steps": 3, "batch_size": 2, "lr_warmup_steps": 0, "caption_dropout": 0.0, "adam_eps": 1e-4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def plain_loop(trainer):
    """The same run with PEFT, diffusers' DDPM and its weights of the loss. Returns losses and weights."""
    config, data = trainer.config, trainer.prepared
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.model, dtype=torch.float32)
    unet, schedule = pipeline.unet.requires_grad_(False), DDPMScheduler.from_config(pipeline.scheduler.config)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed, "adapter"))
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian"), "default"
        )
    trained = [each for each in unet.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, eps=1e-4)
    losses = []
    for step in range(config.steps):
        indices = trainer.training.loader.sampler.step(step).indices
        total = 0.0
        for first in range(0, len(indices), config.batch_size):
            positions = range(first, first + config.batch_size)
            examples = [data.latents[indices[each]] for each in positions]
            random = SampleRandomness(config.seed, step, positions)
            latents = [read_tensors(each.path) for each in examples]
            mean, logvar = (
                torch.stack([each[f"latents_{name}"] for each in latents])[:, :, 0] for name in ("mean", "logvar")
            )
            clean = (mean + (0.5 * logvar).exp() * random.normal("posterior", mean.shape[1:])) * 0.4
            noise = random.normal("noise", (*mean.shape[1:2], 1, *mean.shape[2:]))[:, :, 0]
            timesteps = (sample_u("uniform", random.generators("level")) * 1000).long()
            texts = [
                pipeline.encode_prompt(each.example.caption, do_classifier_free_guidance=False) for each in examples
            ]
            embeds, _, pooled, _ = (each if each[0] is None else torch.cat(each) for each in zip(*texts))
            predicted = unet(
                schedule.add_noise(clean, noise, timesteps),
                timesteps,
                embeds,
                added_cond_kwargs={
                    "text_embeds": pooled,
                    "time_ids": torch.tensor([[48, 48, 0, 0, 48, 48]] * 2).float(),
                },
                return_dict=False,
            )[0]
            if schedule.config.prediction_type == "epsilon":
                loss = (predicted - noise).square().mean()
            else:
                snr = compute_snr(schedule, timesteps)
                weights = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
                errors = (predicted - schedule.get_velocity(clean, noise, timesteps)).square().mean((1, 2, 3))
                loss = (errors * weights).mean()
            (loss / config.gradient_accumulation_steps).backward()
            total += loss.item() / config.gradient_accumulation_steps
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, peft.get_peft_model_state_dict(unet, adapter_name="default")


@pytest.mark.parametrize("name", thorough_but(["sdxl_v"], ["sdxl", "sdxl_v"]))
def test_it_is_a_plain_loop(name, settings_of):
    """Of a UNet that predicts v, with min-SNR."""
    steps = []
    settings = settings_of(name, **RUN)
    trainer = Trainer(TrainConfig(**settings), on_step=lambda _, numbers: steps.append(numbers["loss"]))
    found = load_file(trainer.run())
    losses, weights = plain_loop(trainer)
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
