"""Guidance under a cache of diffusers that keeps a state for each branch, from step to step.

The ranks that compute a branch have its state, in shards of their own mesh. So each branch stays with one group until
the cache is reset, also in steps that would be divided otherwise: then other groups wait, and the result is exact.
"""

from __future__ import annotations

from typing import Any

from .groups import Groups


class CachedRun:
    """Where the branches of one run are computed, from one reset of the cache to the next."""

    def __init__(self) -> None:
        self.has_begun = False
        self.groups: Groups | None = None
        """The groups among which branches are divided; None: all ranks compute every call together."""
        self.owners: dict[str, int] = {}
        """Index of the group that computes a branch, by the branch's name."""

    def begin(self, groups: Groups | None) -> None:
        """Notes the groups of the first step. Does nothing later."""
        if not self.has_begun:
            self.has_begun, self.groups = True, groups

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers when it drops the states."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedRun:
        return CachedRun()  # a copy of a model is not split

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedRun, ()
