"""Describes the dtypes of a model's weights, which weights are trained, and gradient checkpointing.

They decide which exchanges a forward and its backward make, and how large these are. Ranks that differ in them would
wait for each other, or take the data of one exchange for that of another.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


class WeightKinds:
    """Reads them in every forward, from modules that are looked up once and not kept alive.

    Args:
        model: the model.
        attention: its attention modules.
    """

    def __init__(self, model: nn.Module, attention: Iterable[nn.Module]) -> None:
        self._owners = [weakref.ref(each) for each in model.modules() if each._parameters]
        firsts = [_first_owner(each) for each in (*model.children(), *attention)]
        self._samples = [weakref.ref(each) for each in firsts if each is not None]
        """Modules whose dtypes are read: reading those of all weights in every forward takes too long."""
        self._checkpointing = [weakref.ref(each) for each in model.modules() if hasattr(each, "gradient_checkpointing")]

    def current_state(self, in_training: bool) -> list[Any]:
        """The current state, as plain values that compare quickly."""
        dtypes = [weight.dtype for weight in _weights(self._samples)]
        if not in_training:
            return [dtypes]
        trained = [weight.requires_grad for weight in _weights(self._owners)]
        return [dtypes, trained, [bool(getattr(each(), "gradient_checkpointing", 0)) for each in self._checkpointing]]

    def describe(self, in_training: bool) -> dict[str, str]:
        """The current state in words, by name."""
        dtypes, *of_training = self.current_state(in_training)
        names = sorted({str(each).removeprefix("torch.") for each in dtypes})
        found = {"dtypes of weights": ", ".join(names) + (f" (by weight {_digest(dtypes)})" if len(names) > 1 else "")}
        if of_training:
            trained, checkpointing = of_training
            which = f" (by weight {_digest(trained)})" if 0 < sum(trained) < len(trained) else ""
            found["weights that are trained"] = f"{sum(trained)} of {len(trained)}{which}"
            found["gradient checkpointing"] = "on" if any(checkpointing) else "off"
            found["gradient checkpointing"] += f" (by module {_digest(checkpointing)})" if any(checkpointing) else ""
        return found


def _weights(owners: list[weakref.ref[nn.Module]]) -> Iterator[nn.Parameter]:
    for reference in owners:
        owner = reference()
        if owner is not None:
            for weight in owner._parameters.values():
                if weight is not None:
                    yield weight


def _first_owner(module: nn.Module) -> nn.Module | None:
    """The first module within `module` that has a weight of a floating type."""
    for each in module.modules():
        if any(weight is not None and weight.is_floating_point() for weight in each._parameters.values()):
            return each
    return None


def _digest(values: list[Any]) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()
