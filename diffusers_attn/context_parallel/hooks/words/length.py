"""`CPLength` and `CPLogBase`: numbers that depend on the length of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....cp_plans.advanced import CPLength
from .base import ArgumentHook


class ChangeLength(ArgumentHook):
    """Gives the module the length of this rank's shard, or, with `full=True`, that of the full sequence."""

    accepts = "an int"

    @staticmethod
    def changes_value(spec: CPLength) -> bool:
        return spec.of is None

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        spec = self.spec
        if spec.of is not None:
            self.tracker.shard_length(spec.sequence, spec.of(value))
            return value
        if not isinstance(value, int):
            raise self.not_accepted(value, what)
        convert = self.tracker.global_length if spec.full else self.tracker.shard_length
        return convert(spec.sequence, value)


class ChangeLogBase(ArgumentHook):
    """Changes the base of a logarithm of the length, so that the local length gives the value of the full length."""

    accepts = "an int or a float"

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        if not isinstance(value, (int, float)):
            raise self.not_accepted(value, what)
        return self.tracker.log_base(self.spec.sequence, value)
