"""Training of LoRA adapters, on one device or with each sequence shared by several.

The public classes are `TrainingParallel`, which adds data and context parallelism to your own loop under Accelerate;
and `Trainer` with `TrainConfig`, a complete training loop, which `examples/train_lora.py` starts from a command line.

In the order in which a run goes through them:

1. `program` is the trainer as a program, with messages by `commandline` and `once`.
2. `settings` are what the user asks for.
3. `data` are examples in folders or data sets, and the cache of what the encoders made of them.
4. `families` has a file per family of models: what a model takes and what it predicts. `loss` has the objectives.
5. `model` is the pipeline with the adapter.
6. `parallel` makes the groups of processes (`job_ranks`: without groups), under what `accelerate_setup` accepts.
7. `batches` are encoded data with noise, from the random numbers of `randomness`. `transfers` are copies to and from
   the device.
8. `checkpoints` are the files of the run.
9. `loop` is the run itself.

`errors` are those of all of them.
"""

import importlib
from typing import Any

__all__ = ["TrainConfig", "Trainer", "TrainingError", "TrainingParallel"]

# Imported at first use, since they import diffusers, Accelerate and PEFT.
_LAZY = {
    "TrainConfig": "settings.config",
    "Trainer": "loop.trainer",
    "TrainingError": "errors",
    "TrainingParallel": "parallel",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
