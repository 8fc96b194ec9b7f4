"""Errors that keep their message when they are raised in traced code.

Dynamo replaces an exception in traced code; with `fullgraph=True`, by an error of its own without the message. It lets
a few classes of its own through. `raise_error` raises an error that is both such a class and AttentionProviderError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import AttentionProviderError


@functools.cache
def _class() -> type[AttentionProviderError]:
    from torch._dynamo import exc

    passing = getattr(exc, "ResumePrologueTracingError", exc.UncapturedHigherOrderOpError)
    return type(AttentionProviderError.__name__, (AttentionProviderError, passing), {"__module__": __name__})


def raise_error(make: Callable[..., AttentionProviderError | None], *arguments: Any) -> None:
    """Raises the error that `make(*arguments)` returns, if it returns one; also while a compiler traces.

    Raises:
        AttentionProviderError: the error that `make` returned.
    """
    if torch.compiler.is_compiling():
        _raise_while_tracing(make, *arguments)
    else:
        error = make(*arguments)
        if error is not None:
            raise error


# Dynamo calls this function for its result instead of tracing it.
@torch._dynamo.assume_constant_result
def _raise_while_tracing(make: Callable[..., AttentionProviderError | None], *arguments: Any) -> None:
    error = make(*arguments)
    if error is not None:
        raise _class()(*error.args)
