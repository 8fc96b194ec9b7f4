"""What attention in a backward is told about the forward that it recomputes.

Gradient checkpointing runs a forward a second time, in the backward: perhaps after the scope of the forward has ended,
perhaps within the scope of somebody else, and on a GPU in a thread of autograd's own. So each checkpointed forward
takes along what `keep_for_recomputation` names, and is recomputed with that.

Attention that a backward computes by other ways (an `autograd.Function` of a user's own) has no such forward. It gets
what was `stash`ed in the thread that called the backward, whichever thread it runs in.

The names of PyTorch that are used here are private to it, and used here alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

Enter = Callable[[], AbstractContextManager[None]]

_captures: list[Callable[[], Enter]] = []
_STASH = "diffusers_attn"

in_backward_id: Callable[[], int] = torch._C._current_graph_task_id
"""-1 where no backward runs in this thread."""


def keep_for_recomputation(capture: Callable[[], Enter]) -> None:
    """Has `capture` called when a checkpointed forward begins. What it returns is entered where that is recomputed."""
    _captures.append(capture)


def _recomputed_as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    kept = [capture() for capture in _captures]

    def recompute(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for enter in kept:
                stack.enter_context(enter())
            return function(*args, **kwargs)

    return recompute


@functools.cache  # once
def install() -> None:
    """Has both kinds of `torch.utils.checkpoint` recompute with what their forward had. Called before the first scope
    and the first plan; further calls do nothing.

    `checkpoint` itself is not replaced: other modules have imported it by name, and Dynamo compares its identity. One
    object of these two classes is made whenever a checkpointed forward begins, and holds the function that the backward
    calls. Forwards that began before this call ran outside of any scope, and are recomputed so.
    """
    frame, reentrant = torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction
    make, forward = frame.__init__, reentrant.forward

    @functools.wraps(make)
    def make_frame(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make(self, _recomputed_as_now(recompute_fn), *args, **kwargs)

    @functools.wraps(forward)
    def forward_reentrant(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        recompute = _recomputed_as_now(run_function)
        out = forward(ctx, run_function, *args)
        ctx.run_function = recompute
        return out

    frame.__init__ = make_frame  # type: ignore[method-assign]
    reentrant.forward = staticmethod(forward_reentrant)  # type: ignore[method-assign]
    for each in gc.get_objects():  # by their type: `isinstance` would run properties of other libraries' objects
        if type(each) is frame:
            each.recompute_fn = _recomputed_as_now(each.recompute_fn)
        elif type(each) is reentrant._backward_cls and hasattr(each, "run_function"):
            each.run_function = _recomputed_as_now(each.run_function)


_add_reference = ctypes.pythonapi.Py_IncRef
_add_reference.argtypes, _add_reference.restype = [ctypes.py_object], None


def _stash_takes_a_reference() -> bool:
    """Whether PyTorch takes a reference to what is stashed. 2.11 does not, and gives one back all the same when
    something else is stashed, so that objects in use would be freed."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_STASH, probe)
    if sys.getrefcount(probe) > before:
        return True
    _add_reference(probe)
    return False


_TAKES_A_REFERENCE = _stash_takes_a_reference()


def stash(value: object, name: str = _STASH) -> None:
    """Notes `value` in this thread, for the backwards that it calls."""
    if not _TAKES_A_REFERENCE:
        _add_reference(value)
    torch._C._stash_obj_in_tls(name, value)


stash(None)  # in the place of the probe


def stashed(name: str = _STASH) -> Any:
    """What the thread that called the running backward had stashed; None where it had nothing."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None
