"""`CPGatherInput` and `CPOutput`: gather the shards of all ranks, before a module or after it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ....cp_plans.advanced import CPGatherInput
from ....cp_plans.plan import CPOutput
from ....errors import AttentionProviderError
from ....nested import describe, like, updated
from ...sequences.tracker import SequenceTracker
from ..within import check_called
from .base import Place, SetHook, TensorHook, check_dims


class GatherTensor(TensorHook):
    """Gives the module the full tensor."""

    def change_tensor(self, tensor: Tensor, what: str, outputs: Sequence[Any]) -> Tensor:
        return _gathered(tensor, self.spec, self.tracker, f"{what} of '{self.path}'")


class GatherOutputs:
    """A forward hook that gathers a module's outputs. `specs` has a word for each of the first outputs, and None for an
    output that is left as it is."""

    def __init__(self, specs: Sequence[CPOutput | None], place: Place) -> None:
        self.specs = specs
        self.path = place.path
        self.tracker = place.tracker

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        check_called(self, module)
        if isinstance(output, Tensor):
            items = [output]
        else:
            items = list(output.values()) if isinstance(output, Mapping) else list(output)
        if len(self.specs) > len(items):
            raise AttentionProviderError(
                f"the plan gathers {len(self.specs)} outputs of '{self.path}', which returned {describe(output)}. Give "
                "it one CPOutput for each output, or fewer."
            )
        for index, spec in enumerate(self.specs):
            if spec is not None and items[index] is not None:
                items[index] = _gathered(items[index], spec, self.tracker, f"output {index} of '{self.path}'")
        if isinstance(output, Tensor):
            return items[0]
        return updated(output, dict(zip(output, items))) if isinstance(output, Mapping) else like(output, items)


def hooks(place: Place, spec: CPOutput | Sequence[CPOutput | None]) -> Iterator[SetHook]:
    """The hook of one CPOutput, or of a list of them."""
    specs = [spec] if isinstance(spec, CPOutput) else list(spec)
    yield functools.partial(place.module.register_forward_hook, GatherOutputs(specs, place))


def _gathered(tensor: Tensor, spec: CPOutput | CPGatherInput, tracker: SequenceTracker, entry: str) -> Tensor:
    check_dims(tensor, spec, entry)
    gather = tracker.gather_groups if spec.grouped else tracker.gather
    return gather(spec.sequence, tensor, spec.gather_dim)
