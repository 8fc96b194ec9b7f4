"""What the caches of latents and of text embeddings share: checks of encoders' results and of the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .errors import TrainingDataError
from .ranks import Ranks

FORMAT = 1
"""Version of the preprocessing. Increase it if the same settings give other pixels; files are then computed again."""


def rows_of(tensors: Mapping[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """Splits tensors [batch, ...] into a dict of tensors for each of `names`. Raises TrainingDataError."""
    listed = ", ".join(names)
    if not tensors:
        raise TrainingDataError(f"the encoder returned no tensors for {listed}.")
    for name, tensor in tensors.items():
        if tensor.ndim < 1 or tensor.shape[0] != len(names):
            raise TrainingDataError(
                f"the encoder returned {name!r} of shape {list(tensor.shape)} for {listed}; the first dimension must "
                f"be {len(names)}, one for each."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingDataError(
                f"the encoder returned {name!r} with NaN or infinity for {listed}. Some VAEs and text encoders "
                "overflow in half precision; compute in float32 with mixed_precision='no'."
            )
    # Copies, since safetensors would write a view with its entire storage.
    return [{name: tensor[i].detach().cpu().clone() for name, tensor in tensors.items()} for i in range(len(names))]


@contextlib.contextmanager
def naming(what: str, names: Sequence[str]) -> Iterator[None]:
    """Adds a note with `what` and `names` to every exception raised within this context."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}: {', '.join(names)}")
        raise


def check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise TrainingDataError(f"{name}={number}: a number from 1 is accepted.")


def check_shared(missing: Sequence[str], folder: Path, ranks: Ranks) -> None:
    if ranks.any(bool(missing)):
        here = f" Missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}." if missing else ""
        raise TrainingDataError(
            f"{folder} lacks files that other processes have just written. The cache must be in a folder that all "
            f"processes of the job share.{here}"
        )
