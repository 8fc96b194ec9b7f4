"""What a checkpoint has in it: gathered from all processes, written by one, and set again on any number of them.

Tensors are whole in a checkpoint, however they were sharded, and generators have no state that would have to be kept
(see `randomness`). So a run goes on exactly where it was, and with FSDP2 or on other numbers of processes as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data.loader import LatentLoader
from .ema import AdapterAverage
from .errors import TrainingError
from .lora import adapter_weights, load_adapter_weights
from .optim import load_optimizer_state, optimizer_state, resume_schedule
from .resuming import Facts, write_settings

_FORMAT = 2
INITIAL = "initial.safetensors"


class Training(NamedTuple):
    """What changes from step to step."""

    transformer: nn.Module
    """prepared by Accelerate."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    average: AdapterAverage | None
    loader: LatentLoader
    settings: dict[str, Any]
    """from `resuming.settings_of`."""
    facts: Facts
    initial: dict[str, Tensor] | None = None
    """the adapter's beginning, where it moved the base model's weights; see `lora.MOVES_BASE`."""


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
        """Bytes of its tensors."""
        return _bytes([self.adapter, self.average, self.initial, self.optimizer])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def snapshot(training: Training, step: int) -> TrainingSnapshot:
    """The state behind `step`. With FSDP2 every process must call this."""
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
    """Into an empty folder."""
    from safetensors.torch import save_file

    save_file(taken.adapter, folder / "adapter.safetensors")
    if taken.average is not None:
        save_file(taken.average, folder / "average.safetensors")
    if taken.initial is not None:
        save_file(taken.initial, folder / INITIAL)
    torch.save({"optimizer": taken.optimizer}, folder / "optimizer.pt")
    write_settings(folder, taken.settings, taken.facts)
    said = {"format": _FORMAT, "step": taken.step, "loader": taken.loader, "average_steps": taken.average_steps}
    (folder / "state.json").write_text(json.dumps(said, indent=2) + "\n")


def read_initial(folder: Path) -> dict[str, Tensor] | None:
    """The beginning of a checkpoint's adapter, where it moved the base model's weights."""
    from safetensors.torch import load_file

    return load_file(folder / INITIAL) if (folder / INITIAL).is_file() else None


def restore(training: Training, folder: Path) -> int:
    """Sets what `write` wrote. To be called on all processes.

    Returns:
        The step behind which it was taken.

    Raises:
        TrainingError: it is of another adapter, has no average where one is wanted, or is of another version.
        TrainingDataError: it is of other data.
    """
    from safetensors.torch import load_file

    said = _read_state(folder / "state.json")
    training.loader.load_state_dict(said["loader"])
    load_adapter_weights(training.transformer, load_file(folder / "adapter.safetensors"))
    if training.average is not None:
        training.average.load(load_file(folder / "average.safetensors"), said["average_steps"])
    kept = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    load_optimizer_state(training.optimizer, kept["optimizer"], training.settings["optimizer"])
    resume_schedule(training.schedule, int(said["step"]))
    return int(said["step"])


def _read_state(path: Path) -> dict[str, Any]:
    """What state.json says, if it can be meant."""
    try:
        said = json.loads(path.read_text())
        written = said["format"]
        counts = {
            "step": said["step"],
            "average_steps": said["average_steps"],
            **{f"loader.{name}": said["loader"][name] for name in ("epoch", "position")},
        }
        if not isinstance(said["loader"]["batches"], str):
            raise ValueError("loader.batches is not a string")
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise TrainingError(f"--resume: {path} is damaged: {what}. Go on from another checkpoint.") from error
    if written != _FORMAT:
        raise TrainingError(
            f"--resume: {path} has format {written}, and this version writes and reads {_FORMAT}. Go on with the "
            "version that wrote it."
        )
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TrainingError(
                f"--resume: {path} is damaged: {name} is {value!r}, and a whole number from 0 is expected. Go on from "
                "another checkpoint."
            )
    if path.parent.name != f"step-{said['step']:08d}":
        raise TrainingError(
            f"--resume: {path} is of step {said['step']}, and its folder has another step's name. Rename the folder to "
            f"step-{said['step']:08d}, or go on from another checkpoint."
        )
    return said
