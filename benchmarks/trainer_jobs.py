"""What the trainers of a comparison are started with. `trainers_flux.py` and `trainers_wan.py` have one each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Variant(NamedTuple):
    """A trainer, and what distinguishes this job from its others."""

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = {}
    needs: str | None = None
    """The option of `trainers.py` that has the path of this trainer."""


def no_environment(args: argparse.Namespace) -> Mapping[str, str]:
    """No variables."""
    return {}


class Comparison(NamedTuple):
    """A model, and its trainers."""

    title: str
    variants: Mapping[str, Variant]
    make: Callable[[argparse.Namespace, Path], None]
    """Writes all files that the jobs read to a folder."""
    command: Callable[[str, argparse.Namespace, Path, Path], list[str]]
    """The script of a variant and its arguments, given the options, the folder of files and one for the output."""
    environment: Callable[[argparse.Namespace], Mapping[str, str]] = no_environment
    """Variables for the processes of other trainers."""


OURS = {"ours": Variant(), "ours, not compiled": Variant(["--compile", "false"])}


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def ours(args: argparse.Namespace, folder: Path, output: Path, settings: Mapping[str, Any]) -> list[str]:
    """This trainer's script with the settings that all models share."""
    shared = {
        "model": folder / "pipeline", "output_dir": output, "cache_dir": folder / "cache", "batch_size": 1,
        "rank": args.rank, "mixed_precision": "no" if args.tiny else "bf16", "steps": args.steps,
        "learning_rate": 1e-4, "lr_schedule": "constant", "lr_warmup_steps": 0, "timestep_sampling": "logit_normal",
        "optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 0, "caption_dropout": 0.0,
        "checkpoint_every": 0,
    }  # fmt: skip
    script = str(ROOT / "examples" / "train_lora.py")
    return [script, *arguments({**shared, **settings}), *(["--cpu"] if args.device == "cpu" else [])]
