"""`CPForbidden`, `CPRequired`, `CPBlocks` and `CPCache`: words that leave an argument as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....errors import AttentionProviderError
from ....nested import describe
from .base import ArgumentHook


class Unchanged(ArgumentHook):
    """Leaves the argument as it is."""

    @staticmethod
    def changes_value(spec: Any) -> bool:
        return False

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        return value


class Forbidden(Unchanged):
    """Refuses a forward that is given the argument."""

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        raise AttentionProviderError(
            f"this forward was given {what}={describe(value)}, which its context-parallel plan cannot serve: "
            f"{self.spec.reason}"
        )


class Required(Unchanged):
    """Refuses a forward without the argument."""

    needs_value = True

    def apply(self, value: Any, what: str, outputs: Sequence[Any] = ()) -> Any:
        if value is None:
            raise AttentionProviderError(
                f"this forward was given no {what}, without which its context-parallel plan cannot serve it: "
                f"{self.spec.reason}"
            )
        return value


class KeepBlocks(Unchanged):
    """In forwards with this argument, splits its sequence between blocks only."""

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        self.tracker.keep_blocks(self.spec.sequence, self.spec.size)
        return value
