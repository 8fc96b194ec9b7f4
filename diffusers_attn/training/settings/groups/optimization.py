"""The steps, their optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import BELOW_ONE, COUNT, NOT_NEGATIVE, Bounds
from ..choices import OPTIMIZERS, SCHEDULES, WARMUP_STEPS
from ..setting import setting


@dataclass
class OptimizationSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "optimization"

    steps: int = setting(1000, "Number of optimizer steps of the whole run", bounds=COUNT)
    batch_size: int = setting(
        1,
        "Number of examples per forward pass on each process, or on each group of processes that share sequences",
        bounds=COUNT,
    )
    gradient_accumulation_steps: int = setting(1, "Number of forward passes per optimizer step", bounds=COUNT)
    optimizer: str = setting("adamw", "Optimizer", tuple(OPTIMIZERS))
    learning_rate: float | None = setting(
        None,
        "Peak learning rate (default: 1e-4, with --adapter none 1e-5; 1.0 for prodigy)",
        bounds=Bounds(0, 100, low_is_in=False),
    )
    adam_betas: list[float] = setting(
        [0.9, 0.999], "Optimizer's two decay rates of the moment estimates", bounds=BELOW_ONE, length=2
    )
    weight_decay: float = setting(0.01, "Optimizer's decoupled weight decay", bounds=NOT_NEGATIVE)
    adam_eps: float = setting(
        1e-8, "Number that the optimizer adds to its denominator", bounds=Bounds(0, 1, low_is_in=False)
    )
    lr_schedule: str = setting("constant_with_warmup", "Learning-rate schedule", SCHEDULES)
    lr_warmup_steps: int | None = setting(
        None,
        "Number of optimizer steps in which the learning rate rises to its peak "
        f"(default: {WARMUP_STEPS}, or a tenth of --steps if that is fewer)",
        bounds=NOT_NEGATIVE,
    )
    max_grad_norm: float = setting(
        1.0, "Norm to which gradients are clipped; 0 turns clipping off", bounds=NOT_NEGATIVE
    )
    ema_decay: float | None = setting(
        None,
        "Decay per step of an exponential moving average of the adapter, such as 0.999, which is saved in its place "
        "(default: no average)",
        bounds=Bounds(0, 1, low_is_in=False, high_is_in=False),
    )
    seed: int = setting(0, "Seed of all random numbers", bounds=Bounds(0, 2**63 - 1))
