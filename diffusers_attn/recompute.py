"""Restores the state of a forward when gradient checkpointing recomputes it in the backward.

The recomputation may run after the scope of the forward has ended, inside another scope, and on a GPU in one of
autograd's threads. So each checkpointed forward keeps the state that the functions passed to `keep_for_recomputation`
capture, and is recomputed with that state.

Attention that a backward calls in another way (in a user's `autograd.Function`) has no such forward. It uses the value
that was `stash`ed in the thread that called the backward, in whatever thread it runs.

The PyTorch names used in this file are private to PyTorch, and used only here.
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
"""Returns the number of the backward that runs in this thread; -1 if none does."""


def keep_for_recomputation(capture: Callable[[], Enter]) -> None:
    """Registers `capture`. It is called when a checkpointed forward begins, and the context manager factory that it
    returns is entered when that forward is recomputed."""
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
    """Makes both kinds of `torch.utils.checkpoint` recompute with the captured state of their forward. Called before
    the first scope and the first plan; further calls do nothing.

    `checkpoint` itself is not replaced: other modules have imported it by name, and Dynamo compares its identity. One
    object of these two classes is created whenever a checkpointed forward begins, and holds the function that the
    backward calls. Forwards that began before this call ran outside of any scope, and are recomputed outside of any.
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
    """Whether PyTorch takes a reference to a stashed object. PyTorch 2.11 does not, but releases one when another
    object is stashed, which would free objects in use."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_STASH, probe)
    if sys.getrefcount(probe) > before:
        return True
    _add_reference(probe)
    return False


_TAKES_A_REFERENCE = _stash_takes_a_reference()


def stash(value: object, name: str = _STASH) -> None:
    """Stores `value` in this thread, for the backwards that it calls."""
    if not _TAKES_A_REFERENCE:
        _add_reference(value)
    torch._C._stash_obj_in_tls(name, value)


stash(None)  # replaces the probe


def stashed(name: str = _STASH) -> Any:
    """The value that the thread that called the running backward had stashed; None if there is none."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None
