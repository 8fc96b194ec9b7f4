"""An error in code that a compiler is tracing, which a user is to read as it was raised.

Dynamo replaces what is raised in traced code: with `fullgraph=True` by an error of its own without the message. It lets
a few classes of its own pass, and `raise_error` raises one that is both.
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
    """Raises the error that `make` returns for these arguments, if it returns one; also while a compiler traces.

    Raises:
        AttentionProviderError: that one.
    """
    if torch.compiler.is_compiling():
        _raise_while_tracing(make, *arguments)
    else:
        error = make(*arguments)
        if error is not None:
            raise error


# Dynamo calls this for its result, so that it runs as it stands.
@torch._dynamo.assume_constant_result
def _raise_while_tracing(make: Callable[..., AttentionProviderError | None], *arguments: Any) -> None:
    error = make(*arguments)
    if error is not None:
        raise _class()(*error.args)
