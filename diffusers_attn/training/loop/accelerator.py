"""The `accelerate.Accelerator` of a training run."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch

from ...context_parallel.comm.process_groups import set_timeout
from ..errors import TrainingError
from ..settings.config import TrainConfig
from ..settings.flag_names import option
from .checks import check_trackers

DEFAULT_TIMEOUT = 3600.0
"""Seconds a process waits for others. Encoding or generating a video on one process takes longer than torch's default
of 10 minutes."""


def make_accelerator(config: TrainConfig) -> Any:
    """Creates this process's `accelerate.Accelerator`, which initialises the process group.

    Raises:
        TrainingError: several processes were started without a process group; the precision is fp16; or `accelerate
            launch` was given another number of accumulation steps.
    """
    check_trackers(config.trackers)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    unused = config.find_unused_parameters or config.expert == "both"  # a step trains one of the experts
    accelerator = Accelerator(
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers,
        project_dir=config.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused),
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.timeout or DEFAULT_TIMEOUT)),
        ],
    )
    # A process group that the caller initialised has a timeout of its own.
    if config.timeout is not None and torch.distributed.is_initialized():
        set_timeout(torch.distributed.group.WORLD, datetime.timedelta(seconds=config.timeout))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise TrainingError(
            f"{launched} processes were started, but Accelerate found {accelerator.num_processes}. On CPUs, start them "
            "with torchrun or with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu`."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise TrainingError(f"mixed_precision={accelerator.mixed_precision!r}: accepted are 'no' and 'bf16'.")
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise TrainingError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}, but accelerate launch sets "
            f"{accelerator.gradient_accumulation_steps}. Give both the same number."
        )
    return accelerator


def start_trackers(accelerator: Any, config: TrainConfig) -> None:
    """Starts the experiment trackers with the settings of the run.

    Raises:
        TrainingError: a tracker cannot be started.
    """
    if not config.trackers:
        return
    plain = {
        name: each if isinstance(each, (int, float, bool, str)) else str(each)
        for name, each in config.as_dict().items()
    }
    try:
        accelerator.init_trackers(config.tracker_project, plain)
    except Exception as error:  # each tracker has its own error types
        raise TrainingError(f"{option('trackers', config.trackers)} cannot be started: {error}") from error
