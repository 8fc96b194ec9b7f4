"""The command `train`."""

from __future__ import annotations

from typing import Annotated

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What typer does not know goes to the trainer."""


def train(
    ctx: typer.Context,
    gpus: Annotated[
        int,
        typer.Option(
            help="Number of GPUs, each with a process; with the trainer's --cpu, of processes. More GPUs train on more "
            "samples at a time, unless --cp_degree lets them share each sequence.",
            min=1,
        ),
    ] = 1,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print all settings of the trainer, with their defaults, and exit.")
    ] = False,
) -> None:
    """Train a LoRA for Flux, Qwen-Image, Wan and other models, from captioned images or videos.

    All other options are settings of the trainer: --model, --data, --output_dir and those that --settings lists.
    --recipe NAME has the settings for a model on a GPU, --config FILE is a run file, and --dry_run says what to expect.
    For example: `diffusers-attn train --recipe wan-1.3b --data videos/ --output_dir lora/ --dry_run`. The run can be
    killed at any time, and continued with --resume latest. After Ctrl-C it saves a checkpoint, and the exit code is
    130.
    """
    import importlib.util

    from ...errors import AttentionProviderError

    missing = [
        name for name in ("accelerate", "peft", "transformers", "datasets") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise AttentionProviderError(
            f"training needs {', '.join(missing)}: `pip install 'diffusers-attn[train]'`, or in a clone "
            "`pip install -e '.[train]'`."
        )
    from ...training.program import COMMAND, DESCRIPTION, LIST_SETTINGS, run
    from ..launch import launch

    arguments = ["--help"] if settings else list(ctx.args)
    if gpus == 1 or settings:
        run(COMMAND, DESCRIPTION, arguments, LIST_SETTINGS)
    else:
        from ...training.settings.config import TrainConfig

        TrainConfig.from_arguments(
            arguments, prog=COMMAND, list_settings=LIST_SETTINGS
        )  # settings that are not accepted end the command here
        raise typer.Exit(launch("diffusers_attn.training.program", arguments, gpus))
