"""Training of LoRA adapters, on one device or with each sequence shared by several.

The public classes are `TrainingParallel`, which adds data and context parallelism to your own loop under Accelerate;
and `Trainer` with `TrainConfig`, a complete training loop, which `examples/train_lora.py` starts from a command line.

Modules: `parallel` (groups of processes) and `randomness`; `families` (one file per model family) and `loss`; `lora`,
`optim` and `ema` (the trained weights); `data` (examples, cache, batches); `checkpoint`, `state` and `resuming`;
`config` (settings); and `trainer`, which uses all of these.
"""

import importlib
from typing import Any

__all__ = ["TrainConfig", "Trainer", "TrainingError", "TrainingParallel"]

# Imported at first use, since they import diffusers, Accelerate and PEFT.
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
