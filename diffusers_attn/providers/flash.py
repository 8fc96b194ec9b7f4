"""FlashAttention-2 (arXiv 2307.08691), from the package flash-attn.

The adapter calls the low-level functions of the package. They return the lse and accept another lse in the backward.
Since 2.7 they are registered operators, which trace into one graph. Those of 2.6 take the window as one pair and return
more results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from flash_attn import flash_attn_interface
from torch import Tensor

from ..errors import AttentionProviderError
from .flash_family import FlashAttention, Gradients, SequenceLengths, Settings

OPERATORS = hasattr(torch.ops.flash_attn, "_flash_attn_forward")
_functions: Any = torch.ops.flash_attn if OPERATORS else flash_attn_interface
_dense_forward, _dense_backward = _functions._flash_attn_forward, _functions._flash_attn_backward
_varlen_forward, _varlen_backward = _functions._flash_attn_varlen_forward, _functions._flash_attn_varlen_backward
_LSE = 1 if OPERATORS else 5


class Flash2(FlashAttention):
    """The dense kernel, and the variable-length one for key masks."""

    @classmethod
    def dense_forward(cls, query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        result = _call(_dense_forward, query, key, value, *_forward_constants(settings), None, False)
        return result[0], result[_LSE]

    @classmethod
    def dense_backward(
        cls, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, settings: Settings
    ) -> Gradients:
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        constants = (*_forward_constants(settings), None, settings.deterministic)
        _call(_dense_backward, grad_out, query, key, value, out, lse, *grads, *constants)
        return grads

    @classmethod
    def varlen_forward(
        cls, query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        result = _call(_varlen_forward, query, key, value, *lengths, *_forward_constants(settings), None, False)
        return result[0], result[_LSE]

    @classmethod
    def varlen_backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: SequenceLengths,
        settings: Settings,
    ) -> Gradients:
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        constants = (*_forward_constants(settings), None, settings.deterministic)
        _call(_varlen_backward, grad_out, query, key, value, out, lse, *grads, *lengths, *constants)
        return grads


class Flash2Varlen(Flash2):
    """The variable-length kernel for every call."""

    always_varlen: ClassVar[bool] = True


def _forward_constants(settings: Settings) -> tuple[Any, ...]:
    """dropout_p, softmax_scale, causal, window, softcap: in one order everywhere."""
    window = settings.window if OPERATORS else (settings.window,)
    return 0.0, settings.scale, settings.is_causal, *window, settings.softcap


def _call(kernel: Callable[..., Any], *args: Any) -> Any:
    """Calls `kernel`. Raises AttentionProviderError for a feature that the installed build was compiled without."""
    try:
        return kernel(*args)
    except RuntimeError as error:
        if "flash attention build does not support" not in str(error):
            raise
        raise AttentionProviderError(
            f"{str(error).splitlines()[0]} The installed flash-attn was compiled without it: leave that option out, or "
            "install a build that has it."
        ) from error
