"""Finds out whether a forward waits for the device, which a CUDA graph cannot hold.

PyTorch's sync debug mode warns at every operation that waits. A recording that fails in such an operation leaves
PyTorch's allocator and random generators in the state of a capture, so forwards are watched before they are recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

_WARNING = "called a synchronizing CUDA operation"
_IGNORE, _WARN = 0, 1


def watched(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of `function`, and where it first waited for the device ("file.py:12"); None if it never did.

    Other warnings are issued as usual. If the user has set the sync debug mode, it is left as it is.
    """
    before = torch.cuda.get_sync_debug_mode()
    if before != _IGNORE:
        return function(), "torch.cuda.set_sync_debug_mode is in use"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(_WARN)
    try:
        with warnings.catch_warnings(record=True) as issued:
            warnings.filterwarnings("always", message=f".*{_WARNING}")
            result = function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    place = None
    for each in issued:
        if _WARNING in str(each.message):
            place = place or f"{each.filename}:{each.lineno}"
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return result, place
