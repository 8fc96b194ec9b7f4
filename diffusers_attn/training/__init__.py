"""Training of LoRA adapters, on one device or with each sequence shared by several.

The public classes are `TrainingParallel`, which adds data and context parallelism to your own loop under Accelerate;
and `Trainer` with `TrainConfig`, a complete training loop, which `examples/train_lora.py` starts from a command line.

- A step: `trainer` runs it, with `data` (examples, cache, batches), `families` (one file per model family), `noise`,
  `loss`, `optim` and `randomness`. `lora` and `ema` are the trained weights,
  `experts` two transformers that are trained in one run.
- Ranks: `parallel` (groups of processes), `accelerator` and `job_ranks`.
- Settings: `config` and `datasets`, declared by `settings`, `bounds` and `choices`, and read from a `run_file` or
  `recipes`; `checks` refuses those that cannot work, `dry_run` tries them, and `resolved` writes them down.
- Before and after the steps: `models` loads the pipeline (`base_precision`: in fewer bits; `offload`: with its blocks
  elsewhere), `prepare` encodes the data, `evaluation` and `validation` (with `video`) judge the adapter, and `card`
  describes and uploads it.
- Files: `output` (the folder of a run), `checkpoint` with `state` and `manifest`, and `resuming`.
- As a program: `program`, `arguments`, `commandline` and `flag_names`; `progress`, `once`, `interruption` and `errors`.
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
