"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...errors import command
from ..errors import TrainingError
from ..settings.choices import OPTIMIZERS, SCHEDULES


def check_optimizer(name: str) -> None:
    """Raises TrainingError for an unknown optimizer or one whose package is not installed."""
    import importlib.util

    if name not in OPTIMIZERS:
        raise TrainingError(f"optimizer={name!r}: accepted are {', '.join(map(repr, OPTIMIZERS))}.")
    spec = OPTIMIZERS[name]
    if importlib.util.find_spec(spec.package) is None:
        raise TrainingError(f"optimizer={name!r} needs a package that is not installed: {command(spec.install)}.")


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Creates an optimizer.

    Args:
        name: "adamw"; "adamw8bit", with 8-bit state; or "prodigy", which estimates its step size.
        parameters: the parameters to train.
        learning_rate: peak learning rate. None: 1e-4; 1.0 for "prodigy".
        betas: decay rates of Adam's two moment estimates.
        weight_decay: decoupled weight decay.
        eps: number added to Adam's denominator.
        fused: whether "adamw" uses PyTorch's fused kernel.

    Raises:
        TrainingError: an unknown optimizer, or its package is not installed.
    """
    check_optimizer(name)
    common: dict[str, Any] = {
        "lr": OPTIMIZERS[name].learning_rate if learning_rate is None else learning_rate,
        "betas": betas,
        "weight_decay": weight_decay,
        "eps": eps,
    }
    if name == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=fused or None)
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **common)
    import prodigyopt

    # The authors of Prodigy recommend both options for diffusion models.
    return prodigyopt.Prodigy(parameters, **common, use_bias_correction=True, safeguard_warmup=True)


def make_schedule(name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> Any:
    """Creates a learning-rate schedule of diffusers. Call its `step` once after each optimizer step.

    Do not pass it to `accelerator.prepare`, which would step it once per process.

    Args:
        name: one of `SCHEDULES`.
        optimizer: the optimizer whose learning rate is set.
        warmup_steps: number of steps in which the learning rate rises from 0 to its peak.
        steps: number of optimizer steps of the whole run.

    Raises:
        TrainingError: an unknown schedule.
    """
    from diffusers.optimization import get_scheduler

    if name not in SCHEDULES:
        raise TrainingError(f"lr_schedule={name!r}: accepted are {', '.join(map(repr, SCHEDULES))}.")
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with full tensors on the CPU, which is the same for any number of processes.

    With FSDP2 every process must call this.
    """
    state = optimizer.state_dict()
    return {"state": _full_copies(state["state"]), "param_groups": state["param_groups"]}


def _full_copies(state: Any) -> Any:
    """The state with a full copy of every tensor. (bitsandbytes has nested dicts in a parameter's state.)"""
    from .lora import full_copy

    if isinstance(state, dict):
        return {name: _full_copies(each) for name, each in state.items()}
    return full_copy(state) if isinstance(state, torch.Tensor) else state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> None:
    """Loads a state that `optimizer_state` returned. Settings such as the learning rate stay those of `optimizer`.

    Args:
        optimizer: the optimizer.
        state: from `optimizer_state`.
        name: name of the optimizer, one of `OPTIMIZERS`.
    """
    from .lora import sharded_like

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    placed = {}
    for number, parameter in zip(numbers, parameters):
        entries = state["state"].get(number, {})
        placed[number] = {
            name: sharded_like(each, parameter)
            if isinstance(each, torch.Tensor) and tuple(each.shape) == tuple(parameter.shape) and each.ndim
            else each
            for name, each in entries.items()
        }
    groups = [
        {**ours, **{key: theirs[key] for key in OPTIMIZERS[name].state_entries}, "params": theirs["params"]}
        for ours, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def resume_schedule(schedule: Any, step: int) -> None:
    """Moves a schedule to its state after `step`, and sets the learning rate of that step.

    The peak, the warm-up and the number of steps stay those that `make_schedule` was given.
    """
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step - 1, "_step_count": step + 1})
    schedule.step()
