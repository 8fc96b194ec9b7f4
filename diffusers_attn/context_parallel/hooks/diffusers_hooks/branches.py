"""Caches that keep a state for each branch of guidance, by the name that the pipeline gives it (`cache_context`).

Private names of diffusers in this file: `state_manager` and `config` of hooks, `_context` and `_state_cache` of a
`StateManager`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .registry import class_name

PER_BRANCH = frozenset(
    f"diffusers.hooks.{name}"
    for name in (
        "first_block_cache.FBCHeadBlockHook",
        "first_block_cache.FBCBlockHook",
        "mag_cache.MagCacheHeadHook",
        "mag_cache.MagCacheBlockHook",
        "taylorseer_cache.TaylorSeerCacheHook",
    )
)
"""Hooks whose state belongs to a branch, and does not depend on calls of other branches. PyramidAttentionBroadcast
counts all calls; FasterCache uses one branch's output for the other; SeaCache and TextKVCache recognise inputs."""

WITHOUT_STATE = frozenset(
    f"diffusers.hooks.{name}"
    for name in (
        "group_offloading.GroupOffloadingHook",
        "group_offloading.LazyPrefetchGroupOffloadingHook",
        "group_offloading.LayerExecutionTrackerHook",
        "layerwise_casting.LayerwiseCastingHook",
        "layerwise_casting.PeftInputAutocastDisableHook",
    )
)
"""Hooks that move or cast weights. A call depends on nothing that an earlier one has left in them."""

_KEY = "diffusers_attn"
_WITHOUT_NAME = (None, "inference")
State = TypeVar("State")


def with_state(hooks: Iterable[Any]) -> list[Any]:
    """Those hooks that may keep something from one call to the next."""
    return [hook for hook in hooks if class_name(hook) not in WITHOUT_STATE]


def manager_of(hooks: Iterable[Any]) -> Any | None:
    """The state manager of the first of these hooks, if all of them keep a state for each branch; otherwise None."""
    found = with_state(hooks)
    if not found or any(class_name(hook) not in PER_BRANCH for hook in found):
        return None
    if any(getattr(getattr(hook, "config", None), "calibrate", False) for hook in found):
        return None
    return getattr(found[0], "state_manager", None)


def branch_of(manager: Any) -> str | None:
    """The name of the branch that the pipeline calls now; None if it gives none, so that branches share a state."""
    name = None if manager._context is None else manager._context.name
    return None if name in _WITHOUT_NAME else name


def state_of_run(manager: Any, make: Callable[[], State]) -> State:
    """An object that lives as long as the states of the cache, which end with a call of the pipeline.

    Args:
        make: makes it. It must have a method `reset`.
    """
    if _KEY not in manager._state_cache:
        manager._state_cache[_KEY] = make()
    found: State = manager._state_cache[_KEY]
    return found
