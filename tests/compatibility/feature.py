"""A feature: something that users put on a pipeline, and calls of the pipeline that show what it does."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..guidance import families

ORDERS = ("before", "after")
"""Whether the feature is put on before or after this library."""


def wan() -> Any:
    """Calls its transformer twice a step, with the prompt and without it. In float64; latents are its result."""
    return families.build("wan")


def draw_wan(pipe: Any) -> list[Tensor]:
    return [families.draw(pipe, "wan", seed=seed) for seed in (0, 1)]


def nothing(pipe: Any) -> None:
    """The feature is in the calls."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One line of the matrix."""

    put: Callable[[Any], Any] = nothing
    """Puts the feature on a pipeline. May return another pipeline, which is used from then on."""
    build: Callable[[], Any] = wan
    draw: Callable[[Any], list[Tensor]] = draw_wan
    """Calls the pipeline. All tensors that it returns are compared."""
    plain: Callable[[Any], list[Tensor]] | None = None
    """The same calls without the feature, whose results must differ: otherwise the cell would show nothing. None: the
    feature does not change results, or `draw` has no equivalent without it."""
    orders: tuple[str, ...] = ORDERS
    """`("before",)` for features whose order does not matter."""
    not_under: tuple[str, ...] = ("vae", "whole")
    """Ways that the feature does not meet."""
    tolerance: float = 1e-10
    """Largest accepted difference, relative to the largest value. The models are in float64, unless this says else."""
    package: str | None = None
    """A package without which the feature does not exist."""

    @property
    def missing(self) -> str | None:
        """The package that is not installed here, if any."""
        try:
            absent = self.package is not None and importlib.util.find_spec(self.package) is None
        except ModuleNotFoundError:  # a part of a package that is not installed
            absent = True
        return self.package if absent else None


def lossy(put: Callable[[Any], Any], **options: Any) -> Feature:
    """A feature that changes the results."""
    draw = options.get("draw", draw_wan)
    return Feature(put, **{"plain": draw} | options)
