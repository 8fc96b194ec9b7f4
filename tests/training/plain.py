"""A run as PEFT, diffusers and PyTorch make it without this library. Tests compare the trainer's with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from diffusers_attn.training.data.latent_cache import CachedLatents
from diffusers_attn.training.data.store import read_tensors
from diffusers_attn.training.randomness import SampleRandomness, derived_seed

RUN = {
    # (With a smaller eps, Adam turns the rounding of gradients near zero into whole steps.)
    "batch_size": 2, "lr_warmup_steps": 0, "caption_dropout": 0.0, "adam_eps": 1e-4,
}  # fmt: skip
"""Settings of a run that `plain_loop` repeats."""

Loss = Callable[[str, Sequence[CachedLatents], SampleRandomness], Tensor]
"""The loss of a micro-batch: of the name of the model that is trained, the examples and their random numbers."""


def plain_loop(
    trainer: Any,
    models: Mapping[str, nn.Module],
    loss: Loss,
    chosen: Callable[[int], str] | None = None,
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
) -> tuple[list[float], dict[str, dict[str, Tensor]]]:
    """Trains adapters as `trainer` did with settings of `RUN`: the same examples, with an optimizer for each model.

    Args:
        trainer: a finished run.
        models: the models without adapters, by name.
        loss: the mean loss of a micro-batch.
        chosen: the name of the model that a step trains. None: the only one.
        targets: names of the layers with adapters.

    Returns:
        The loss of each step, and the weights of each model's adapter.
    """
    config, data = trainer.config, trainer.prepared
    optimizers, trained = {}, {}
    for name, model in models.items():
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, "adapter"))
            lora = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"}
            model.add_adapter(peft.LoraConfig(**lora, target_modules=list(targets)), "default")
        trained[name] = [each for each in model.parameters() if each.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained[name], lr=1e-3, weight_decay=0.01, eps=1e-4)
    losses = []
    for step in range(config.steps):
        name = next(iter(models)) if chosen is None else chosen(step)
        indices = trainer.training.loader.sampler.step(step).indices
        total = 0.0
        for first in range(0, len(indices), config.batch_size):
            positions = range(first, first + config.batch_size)
            examples = [data.latents[indices[each]] for each in positions]
            found = loss(name, examples, SampleRandomness(config.seed, step, positions))
            (found / config.gradient_accumulation_steps).backward()
            total += found.item() / config.gradient_accumulation_steps
        torch.nn.utils.clip_grad_norm_(trained[name], 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        losses.append(total)
    return losses, {
        name: peft.get_peft_model_state_dict(model, adapter_name="default") for name, model in models.items()
    }


def cached_sample(examples: Sequence[CachedLatents], random: SampleRandomness) -> Tensor:
    """A sample of each example's cached distribution of latents, as the VAE has them."""
    cached = [read_tensors(each.path) for each in examples]
    mean, logvar = (torch.stack([each[f"latents_{name}"] for each in cached]) for name in ("mean", "logvar"))
    return mean + (0.5 * logvar).exp() * random.normal("posterior", mean.shape[1:])
