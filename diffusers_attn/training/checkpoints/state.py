"""The content of a checkpoint: gathered from all processes, written by one, and loaded by any number of them.

A checkpoint has full tensors, also if FSDP2 sharded them, and no state of random generators (see `randomness`). So a
run can be resumed exactly, also on another number of processes or with another sharding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...json_files import read_json
from ..data.loader import LatentLoader
from ..errors import TrainingError
from ..model.ema import AdapterAverage
from ..model.lora import adapter_weights, load_adapter_weights
from ..model.optim import load_optimizer_state, optimizer_state, resume_schedule
from . import tensors_and_values
from .resuming import Facts, write_settings

_FORMAT = 3
INITIAL = "initial.safetensors"


class Training(NamedTuple):
    """The objects whose state a checkpoint stores."""

    transformer: nn.Module
    """The model, prepared by Accelerate."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    average: AdapterAverage | None
    loader: LatentLoader
    settings: dict[str, Any]
    """Settings from `resuming.settings_of`."""
    facts: Facts
    initial: dict[str, Tensor] | None = None
    """Initial weights of the adapter if they changed the base model; see `lora.MOVES_BASE`."""


class TrainingSnapshot(NamedTuple):
    """A checkpoint in memory."""

    step: int
    adapter: dict[str, Tensor]
    average: dict[str, Tensor] | None
    average_steps: int
    optimizer: dict[str, Any]
    loader: dict[str, Any]
    settings: dict[str, Any]
    facts: Facts
    initial: dict[str, Tensor] | None = None

    @property
    def size(self) -> int:
        """Size of all tensors in bytes. The adapter is written a second time, for diffusers."""
        return _bytes([self.adapter, self.adapter, self.average, self.initial, self.optimizer])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def snapshot(training: Training, step: int) -> TrainingSnapshot:
    """Copies the state after `step` to memory. With FSDP2 every process must call this."""
    average = training.average
    return TrainingSnapshot(
        step,
        adapter_weights(training.transformer),
        None if average is None else average.weights(),
        0 if average is None else average.steps,
        optimizer_state(training.optimizer),
        training.loader.state_dict(),
        training.settings,
        training.facts,
        training.initial,
    )


def write(taken: TrainingSnapshot, folder: Path) -> None:
    """Writes a snapshot into an empty folder."""
    from safetensors.torch import save_file

    save_file(taken.adapter, folder / "adapter.safetensors")
    if taken.average is not None:
        save_file(taken.average, folder / "average.safetensors")
    if taken.initial is not None:
        save_file(taken.initial, folder / INITIAL)
    tensors_and_values.write(taken.optimizer, folder / "optimizer")
    write_settings(folder, taken.settings, taken.facts)
    state = {"format": _FORMAT, "step": taken.step, "loader": taken.loader, "average_steps": taken.average_steps}
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def read_initial(folder: Path) -> dict[str, Tensor] | None:
    """The adapter's initial weights in a checkpoint; None if they did not change the base model."""
    from safetensors.torch import load_file

    return load_file(folder / INITIAL) if (folder / INITIAL).is_file() else None


def restore(training: Training, folder: Path) -> int:
    """Loads the state that `write` wrote. All processes must call this.

    Returns:
        The step of the checkpoint.

    Raises:
        TrainingError: the checkpoint is from another adapter or another version, or is damaged.
        TrainingDataError: the checkpoint is from other data.
    """
    from safetensors.torch import load_file

    state = _read_state(folder / "state.json")
    training.loader.load_state_dict(state["loader"])
    load_adapter_weights(training.transformer, load_file(folder / "adapter.safetensors"))
    if training.average is not None:
        training.average.load(load_file(folder / "average.safetensors"), state["average_steps"])
    saved = tensors_and_values.read(folder / "optimizer")
    load_optimizer_state(training.optimizer, saved, training.settings["optimizer"])
    resume_schedule(training.schedule, int(state["step"]))
    return int(state["step"])


def _read_state(path: Path) -> dict[str, Any]:
    """Reads and checks state.json."""
    try:
        state = read_json(path)
        written = state["format"]
        counts = {
            "step": state["step"],
            "average_steps": state["average_steps"],
            **{f"loader.{name}": state["loader"][name] for name in ("epoch", "position")},
        }
        if not isinstance(state["loader"]["batches"], str):
            raise ValueError("loader.batches is not a string")
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise TrainingError(f"--resume: {path} is damaged: {what}. Resume from another checkpoint.") from error
    if written != _FORMAT:
        raise TrainingError(
            f"--resume: {path} has format {written}, but this version reads format {_FORMAT}. Resume with the version "
            "that wrote it."
        )
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TrainingError(
                f"--resume: {path} is damaged: {name} is {value!r}, but a whole number from 0 is expected. Resume from "
                "another checkpoint."
            )
    if path.parent.name != f"step-{state['step']:08d}":
        raise TrainingError(
            f"--resume: {path} is from step {state['step']}, but its folder is named for another step. Rename the "
            f"folder to step-{state['step']:08d}, or resume from another checkpoint."
        )
    return state
