"""Training LoRA adapters, on one device or with each sequence shared by several.

Two things are for users: `TrainingParallel`, three lines that give a loop of one's own data parallelism times context
parallelism under Accelerate; and `Trainer`, a whole loop, which `examples/train_lora.py` starts from a command line.

Read in this order: `parallel` and `randomness` say which rank trains on what; `families` what differs from model to
model, and `loss` what they have in common; `lora`, `optim` and `ema` what is trained, and how; `checkpoint` what is
kept; `data` where examples come from; `trainer` puts them together, with settings from `config`.
"""

import importlib
from typing import Any

__all__ = ["TrainConfig", "Trainer", "TrainingError", "TrainingParallel"]

# Diffusers, Accelerate and PEFT are imported when they are needed.
_LAZY = {
    "TrainConfig": "config",
    "Trainer": "trainer",
    "TrainingError": "errors",
    "TrainingParallel": "parallel",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
