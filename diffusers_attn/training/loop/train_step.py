"""One optimizer step: forward and backward passes over its micro-batches, and the update."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.state import Training
from ..families import Family
from ..families.denoising import losses_of
from ..model.lora import trained_parameters
from ..model.peft_casts import castless_layers, without_casts
from ..parallel import TrainingParallel
from ..randomness import derived_seed
from ..settings.config import TrainConfig


class Stepped(NamedTuple):
    """The numbers of one step. Tensors are scalars on the device, which may not have computed them yet."""

    loss: Tensor
    """Mean over this process's examples."""
    gradient_norm: Tensor
    """Of all processes, before clipping."""
    learning_rate: float
    tokens: int
    """Number of tokens on all processes."""


class TrainStep:
    """Trains a step at each call.

    Args:
        config: the settings.
        accelerator: the run's `accelerate.Accelerator`.
        parallel: the processes.
        family: the family of the model.
        training: the wrapped model with its schedule and average.
        optimizer: Accelerate's wrapper of the optimizer.

    Attributes:
        parameters: the trained parameters of the wrapped model.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Any,
        parallel: TrainingParallel,
        family: Family,
        training: Training,
        optimizer: Any,
    ) -> None:
        self.config, self.accelerator, self.parallel = config, accelerator, parallel
        self.family, self.training, self.optimizer = family, training, optimizer
        self.parameters = list(trained_parameters(training.transformer).values())
        autocast = accelerator.mixed_precision == "bf16"
        self._castless = castless_layers(training.transformer) if autocast else []
        self._checked = False
        """Whether the processes have compared their first batch."""

    def __call__(self, micros: Iterator[dict[str, Any]]) -> Stepped:
        """Trains one step on the next micro-batches. Nothing in it waits for the device, except in the first step."""
        accelerator, config, training = self.accelerator, self.config, self.training
        model = training.transformer
        total = torch.zeros((), device=accelerator.device)
        tokens = 0
        for _ in range(config.gradient_accumulation_steps):
            batch = next(micros)
            with accelerator.accumulate(model), without_casts(self._castless):
                parts = self.family.parts(batch)
                for part in parts:
                    last = part is parts[-1]
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        loss = self._loss(part) / len(parts)
                        accelerator.backward(loss)
                    total += loss.detach() / config.gradient_accumulation_steps
                tokens += self.family.tokens(batch["latents_mean"].shape) * config.batch_size * self.parallel.dp_degree
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm or float("inf"))
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = training.schedule.get_last_lr()[0]
        training.schedule.step()
        if training.average is not None:
            training.average.step()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return Stepped(total, norm, rate, tokens)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a micro-batch, a scalar on the device."""
        config, family = self.config, self.family
        device = self.accelerator.device
        on_device, drawn = (
            {name: each.to(device, non_blocking=True) for name, each in these.items() if isinstance(each, Tensor)}
            for these in (batch, batch["drawn"])
        )
        if not self._checked:
            self._checked = True
            self.parallel.check({**on_device, **drawn})
        if config.adapter_dropout:
            torch.manual_seed(derived_seed(config.seed, "dropout", batch["step"], batch["positions"][0]))
        model: Any = self.training.transformer
        if len(family.trained) > 1:
            model = functools.partial(model, batch["trained"])
        losses = losses_of(family, model, on_device, drawn)
        return (losses * on_device["loss_weight"]).mean()
