"""The compiled call of a module that must be one graph.

Private name of PyTorch, which only this file uses: `torch._dynamo.exc.Unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import AttentionProviderError


class OneGraph:
    """Calls a compiled module. Where PyTorch cannot compile it as one graph, the error says what to do.

    Args:
        module: the module.
        compiled: its call, compiled with fullgraph=True.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        from torch._dynamo.exc import Unsupported

        self._name = type(module).__name__
        self._compiled = compiled
        self._unsupported = Unsupported

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except self._unsupported as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise AttentionProviderError(
                f"{self._name} cannot be compiled as one graph: {reason}. Caches of diffusers and other hooks may "
                "decide in Python what to compute. Compile the parts between these decisions: apply_compile(model, "
                "fullgraph=False)."
            ) from error
