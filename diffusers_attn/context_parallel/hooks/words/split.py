"""`CPInput`: splits a tensor that is the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....cp_plans.plan import CPInput
from ....errors import AttentionProviderError
from ....tracing.errors import raise_error
from .base import Place, TensorHook, check_dims
from .too_short import has_entries, problem_of


class SplitTensor(TensorHook):
    """Gives the module this rank's shard."""

    def __init__(self, spec: CPInput, place: Place) -> None:
        super().__init__(spec, place)
        if spec.sequence is not None:
            names = (spec.sequence,) if isinstance(spec.sequence, str) else spec.sequence
            self.tracker.named.update(names)
            self.tracker.balanced.update(names if spec.balanced else ())

    @staticmethod
    def is_for_output(spec: CPInput) -> bool:
        return spec.split_output

    def change_tensor(self, tensor: Tensor, what: str, outputs: Sequence[Any]) -> Tensor:
        spec = self.spec
        if spec.leave_other_dims and (
            spec.expected_dims not in (None, tensor.ndim) or tensor.shape[spec.split_dim] == 1
        ):
            return tensor
        check_dims(tensor, spec, f"{what} of '{self.path}'")
        if not has_entries(tensor, spec.split_dim, self.tracker.mesh.size):
            problem = problem_of(tensor, spec, f"{what} of '{self.path}'", self.tracker, outputs)
            if problem is not None:
                raise_error(AttentionProviderError, problem)
        sequence = spec.sequence or f"{self.path}:{what}"
        if spec.grouped:
            return self.tracker.split_groups(sequence, tensor, spec.split_dim)
        return self.tracker.split(sequence, tensor, spec.split_dim, spec.flattened, spec.split_already)
