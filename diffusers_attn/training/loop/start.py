"""The start of a run, before the model is loaded: its checks, and the checkpoint that it goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoints
from ..checkpoints.output import check_output
from ..checkpoints.resuming import check_steps, read_settings, resume_settings
from ..data.ranks import in_step
from ..errors import TrainingError
from ..model.base_precision import check_base_precision
from ..parallel import TrainingParallel, check_trainable
from ..settings.config import TrainConfig
from .checks import check_optimizing, check_settings


class Start(NamedTuple):
    """What a run starts from."""

    config: TrainConfig
    """The settings; those that a resumed run keeps are the checkpoint's."""
    checkpoint: Path | None
    """Checkpoint to resume from; None for a new run."""
    resumed_settings: dict[str, Any] | None
    """Settings of the checkpoint's run; None for a new run."""


def start(config: TrainConfig, accelerator: Any, parallel: TrainingParallel, checkpoints: Checkpoints) -> Start:
    """Makes all checks that need no model, finds the checkpoint, and merges its settings.

    Raises:
        TrainingError: settings that cannot be used, a checkpoint that cannot be resumed, or an output folder of an
            earlier run.
    """
    device, ranks = accelerator.device, parallel.ranks
    main = ranks.rank == 0
    sharded = accelerator.distributed_type == "FSDP"
    check_optimizing(config, device, sharded)
    check_base_precision(config, device, sharded)
    if config.attn_provider is not None:
        check_trainable(config.attn_provider, device.type, parts=parallel.cp_degree > 1)
    if config.adapter_dropout and parallel.cp_degree > 1:
        raise TrainingError(
            f"adapter_dropout={config.adapter_dropout} with cp_degree={parallel.cp_degree}: processes that "
            "share a sequence would apply different dropout masks to tensors that all of them have. Set "
            "adapter_dropout=0 or cp_degree=1."
        )
    in_step(ranks, [None] if main else [], lambda _: check_settings(config), "checking the settings")
    found, message = _resumed(config, parallel, checkpoints)
    if message and main:  # before there is a progress bar
        print(message, file=sys.stderr, flush=True)
    if config.resume is None and checkpoints.steps() and not config.overwrite:
        raise TrainingError(
            f"output_dir={config.output_dir!r} has checkpoints of an earlier run. Resume it with --resume latest, "
            "give another folder, or replace it with --overwrite."
        )
    own = found.checkpoint is not None and checkpoints.owns(found.checkpoint)
    check_output(config.output, own, config.overwrite)
    return found


def _resumed(config: TrainConfig, parallel: TrainingParallel, checkpoints: Checkpoints) -> tuple[Start, str]:
    """The start from the checkpoint that the settings name, with a message: settings that differ from its own."""
    checkpoint = checkpoints.find(config.resume)
    if checkpoint is None:
        if config.resume is None:
            return Start(config, None, None), ""
        message = f"--resume {config.resume}: {checkpoints.folder} has no checkpoint yet. Starting a new run."
        return Start(config, None, None), message
    own = checkpoints.owns(checkpoint)
    check_steps(config.steps, checkpoints.step_of(checkpoint), checkpoints.steps() if own else [])
    settings = read_settings(checkpoint)
    config, differences = resume_settings(config, settings, parallel.dp_degree)
    return Start(config, checkpoint, settings), "\n  ".join([f"resuming from {checkpoint}", *differences])
