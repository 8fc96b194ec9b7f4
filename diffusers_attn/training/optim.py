"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..errors import command
from .errors import TrainingError

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
WITHOUT_WARMUP = ("constant",)


class _Optimizer(NamedTuple):
    package: str
    """that has it."""
    install: str
    learning_rate: float
    """where a user gives none."""
    moving: tuple[str, ...] = ()
    """entries of its parameter groups that are state: it changes them itself. All others are settings."""


OPTIMIZERS = {
    "adamw": _Optimizer("torch", "", 1e-4),
    "adamw8bit": _Optimizer("bitsandbytes", "pip install bitsandbytes", 1e-4),
    "prodigy": _Optimizer("prodigyopt", "pip install prodigyopt", 1.0, ("d", "d_max", "d_numerator", "k")),
}


def check_optimizer(name: str) -> None:
    """Raises TrainingError where there is no such optimizer, or its package is missing."""
    import importlib.util

    if name not in OPTIMIZERS:
        raise TrainingError(f"optimizer={name!r}: accepted are {', '.join(map(repr, OPTIMIZERS))}.")
    spec = OPTIMIZERS[name]
    if importlib.util.find_spec(spec.package) is None:
        raise TrainingError(f"optimizer={name!r} is in a package that is not installed: {command(spec.install)}.")


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
    """An optimizer.

    Args:
        name: "adamw"; "adamw8bit", whose state is small; "prodigy", which finds its own step size.
        parameters: to train.
        learning_rate: None is 1e-4, of "prodigy" 1.0.
        betas, weight_decay, eps: of Adam.
        fused: whether "adamw" may run as one kernel.

    Raises:
        TrainingError: no such optimizer, or its package is missing.
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

    # Of both, what its authors advise for diffusion models.
    return prodigyopt.Prodigy(parameters, **common, use_bias_correction=True, safeguard_warmup=True)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int, cycles: int = 1, power: float = 1.0
) -> Any:
    """The learning rate over a run of `steps`, from diffusers. To be stepped once after each step of the optimizer.

    It must not be given to `accelerator.prepare`, which would step it once for every process.

    Raises:
        TrainingError: no such schedule.
    """
    from diffusers.optimization import get_scheduler

    if name not in SCHEDULES:
        raise TrainingError(f"lr_schedule={name!r}: accepted are {', '.join(map(repr, SCHEDULES))}.")
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
        num_cycles=cycles,
        power=power,
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with whole tensors, on the CPU: the same for any number of processes. With FSDP2 every
    process must call this."""
    state = optimizer.state_dict()
    return {"state": _whole(state["state"]), "param_groups": state["param_groups"]}


def _whole(state: Any) -> Any:
    """With all tensors in it whole and on the CPU. (bitsandbytes has dicts of its own in a parameter's state.)"""
    from .lora import whole

    if isinstance(state, dict):
        return {name: _whole(each) for name, each in state.items()}
    return whole(state) if isinstance(state, torch.Tensor) else state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> None:
    """Sets what `optimizer_state` returned. Settings, such as learning rate, betas and weight decay, stay those of
    `optimizer`.

    Args:
        name: of the optimizer, one of `OPTIMIZERS`.
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
        {**ours, **{key: theirs[key] for key in OPTIMIZERS[name].moving}, "params": theirs["params"]}
        for ours, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def resume_schedule(schedule: Any, step: int) -> None:
    """Moves a schedule from `make_schedule` to where it is behind `step`, and sets the learning rate that it has there.
    What it goes on with is its own: the peak, the warm-up and the number of steps."""
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step - 1, "_step_count": step + 1})
    schedule.step()
