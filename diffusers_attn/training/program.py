"""The trainer as a program: a command line, messages for users, and exit codes.

`examples/train_lora.py` and `diffusers-attn train` are this program; so is `python -m diffusers_attn.training.program`,
which `diffusers-attn train` starts on several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

DESCRIPTION = (
    "Train a LoRA for Flux, Qwen-Image, Wan or another diffusion transformer, on one device or with each sequence "
    "shared by several."
)
COMMAND, LIST_SETTINGS = "diffusers-attn train", "--settings"
EXAMPLES = """\
examples:
  {program} --recipe flux2-klein --data photos/ --output_dir lora/ --dry_run
  {program} --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data videos/ --mixed_precision bf16
  {program} --config run.yaml --learning_rate 5e-5 --resume latest

recipes, each for one GPU:
{recipes}"""
"""Shown by --help above the settings."""


def run(program: str, description: str, arguments: Sequence[str] | None = None, list_settings: str = "--help") -> None:
    """Trains, as one process of the job. Returns after success of a job of one process, and ends the process otherwise.

    The exit code is 0 after success, 1 after an error, 2 for settings that are not accepted, 130 after SIGINT and 143
    after SIGTERM.

    Args:
        program: name of the program, for messages.
        description: its description, for --help.
        arguments: the command line; None for that of this process.
        list_settings: the option of the program that lists all settings, for messages.
    """
    from .errors import TrainingInterrupted

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    first = os.environ.get("RANK", "0") == "0"
    try:
        _train(program, description, arguments, list_settings)
    except TrainingInterrupted as interruption:
        if first:
            print(f"{program}: {interruption}", file=sys.stderr)
        _leave(interruption.exit_code)
    except KeyboardInterrupt:
        if first:
            print(f"{program}: interrupted before training began, or after its end.", file=sys.stderr)
        _leave(130)
    except Exception as error:
        from .commandline import report

        report(error, program)
        if several:
            _leave(1)
        sys.exit(1)
    if several:
        import torch.distributed as dist

        dist.barrier()
        _leave(0)


def _train(program: str, description: str, arguments: Sequence[str] | None, list_settings: str) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages
    from .settings.config import TrainConfig

    description = f"{description}\n\n{examples(program)}"
    config = TrainConfig.from_arguments(arguments, prog=program, description=description, list_settings=list_settings)

    # Large imports, after everything that a command line can be refused for.
    import diffusers
    import transformers

    from .commandline import log_warnings
    from .loop.trainer import Trainer

    log_warnings()
    if os.environ.get("RANK", "0") != "0":  # only rank 0 shows progress bars
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    trainer = Trainer(config)
    path = trainer.run()
    if trainer.main and not config.dry_run:
        print(f"saved {path}", flush=True)


def examples(program: str) -> str:
    """Examples of a command line, and the recipes."""
    from .settings.recipes import recipes

    names = recipes()
    width = max(map(len, names))
    lines = (f"  {name:{width}}  {description}" for name, description in names.items())
    return EXAMPLES.format(program=program, recipes="\n".join(lines))


def _leave(code: int) -> None:
    """Ends the process without destroying process groups. After a failure, other processes may be waiting in a
    collective; after success, gloo's threads may abort a process that destroys its groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(COMMAND, DESCRIPTION, list_settings=LIST_SETTINGS)
