"""Measured steps beside the predictions of `advise`, for the models that benchmarks measured.

Steps on H200 with NVLink, in bfloat16, with compiled blocks and cuDNN, on hosts that do not slow them down. Each is in
the file `benchmarks/results/RUN.json` of the repository.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from .gpus import GPUS
from .grids import size_of
from .model import ModelDescription
from .predict import predict


class MeasuredStep(NamedTuple):
    """A measured step."""

    gpus: int
    strategy: str
    """As in predictions; empty for one GPU."""
    ms: float
    run: str
    variant: str
    """Name of the variant in the run."""


class Model(NamedTuple):
    """A measured model, at the default size of its class."""

    cls: str
    parameters: int
    words: str
    run_words: str
    """Name of the model in the runs."""
    steps: tuple[MeasuredStep, ...]


MEASURED = (
    Model(
        "FluxTransformer2DModel",
        11_901_408_320,
        "Flux, 1024 x 1024",
        "Flux 1024²",
        (
            MeasuredStep(1, "", 130.8, "context_parallel-flux-h200x2", "single"),
            MeasuredStep(2, "a gather of 2", 74.0, "context_parallel-flux-h200x2", "gather+graph"),
            MeasuredStep(2, "Ulysses over 2", 80.4, "context_parallel-flux-h200x2", "ulysses"),
            MeasuredStep(4, "a gather of 4", 42.2, "context_parallel-flux-by-default-h200x4", "defaults"),
        ),
    ),
    Model(
        "WanTransformer3DModel",
        1_418_996_800,
        "Wan 2.1 1.3B, 480 x 832, 81 frames",
        "Wan 2.1 1.3B 480p, 81 frames",
        (
            MeasuredStep(1, "", 522.7, "context_parallel-wan-h200x2", "single"),
            MeasuredStep(2, "a gather of 2", 265.9, "context_parallel-wan-h200x2", "gather"),
            MeasuredStep(2, "Ulysses over 2", 275.3, "context_parallel-wan-providers-h200x2", "ulysses"),
            MeasuredStep(4, "a gather of 4", 137.3, "context_parallel-wan-by-default-cudnn-h200x4", "gather"),
            MeasuredStep(4, "a ring of 4", 145.6, "context_parallel-wan-by-default-cudnn-h200x4", "ring"),
            MeasuredStep(4, "Ulysses over 4", 145.1, "context_parallel-wan-by-default-cudnn-h200x4", "ulysses"),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A measured step beside its prediction."""

    gpus: int
    strategy: str
    measured_seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive if it is too slow."""
        return self.predicted_seconds / self.measured_seconds - 1


def compared(described: ModelDescription) -> tuple[str, list[Compared]]:
    """What was measured, in words, and the measured steps of this model beside their predictions; empty for others."""
    cls = type(described.model)
    found = next(
        (each for each in MEASURED if each.cls == cls.__name__ and each.parameters == described.parameters), None
    )
    if found is None:
        return "", []
    size, gpu = size_of(cls, None, None, None, None), GPUS["h200"]
    rows = []
    for count in sorted({each.gpus for each in found.steps}):
        hardware = gpu.hardware(None, 1)
        predicted = predict(described, size, hardware, gpu.capability, ["_native_cudnn"], count, count)
        by_name = {each.strategy: each.seconds for each in predicted}
        rows += [
            Compared(each.gpus, each.strategy, each.ms / 1e3, by_name[each.strategy])
            for each in found.steps
            if each.gpus == count
        ]
    return found.words, rows
