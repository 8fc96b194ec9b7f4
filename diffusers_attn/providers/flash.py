"""FlashAttention-2 (arXiv 2307.08691), from the package flash-attn or from the Hub.

The adapter calls the low-level functions of the package. They return the lse and accept another lse in the backward.
Since 2.7 they are registered operators, which trace into one graph. Those of 2.6 take the window as one pair and return
more results. The kernel on the Hub has those of 2.8.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Adapter
from .flash_family import FlashAttention, FlashSettings, Gradients, SequenceLengths, call_kernel, takes_window_pair


class Flash2Functions(NamedTuple):
    """The functions of `flash_attn_interface`."""

    dense_forward: Callable[..., Any]
    dense_backward: Callable[..., Any]
    varlen_forward: Callable[..., Any]
    varlen_backward: Callable[..., Any]
    window_pair: bool
    """Whether they take the window as one pair."""
    lse: int
    """Index of the lse in what a forward returns."""


class Flash2(FlashAttention):
    """The dense kernel, and the variable-length one for key masks."""

    functions: ClassVar[Flash2Functions]

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        names = "forward", "backward", "varlen_forward", "varlen_backward"
        forward, backward, varlen_forward, varlen_backward = (getattr(package, f"_flash_attn_{name}") for name in names)
        pair = takes_window_pair(forward)
        functions = Flash2Functions(forward, backward, varlen_forward, varlen_backward, pair, 5 if pair else 1)
        return type(cls.__name__, (cls,), {"functions": functions})

    @classmethod
    def run(
        cls, query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths | None, settings: FlashSettings
    ) -> tuple[Tensor, Tensor]:
        kernel = cls.functions.dense_forward if lengths is None else cls.functions.varlen_forward
        constants = (*cls._forward_constants(settings), None, False)
        result = call_kernel(kernel, query, key, value, *(lengths or ()), *constants)
        return result[0], result[cls.functions.lse]

    @classmethod
    def run_backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: SequenceLengths | None,
        settings: FlashSettings,
    ) -> Gradients:
        kernel = cls.functions.dense_backward if lengths is None else cls.functions.varlen_backward
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        constants = (*cls._forward_constants(settings), None, settings.deterministic)
        call_kernel(kernel, grad_out, query, key, value, out, lse, *grads, *(lengths or ()), *constants)
        return grads

    @classmethod
    def _forward_constants(cls, settings: FlashSettings) -> tuple[Any, ...]:
        """dropout_p, softmax_scale, causal, window, softcap: in one order everywhere."""
        window = (settings.window,) if cls.functions.window_pair else settings.window
        return 0.0, settings.scale, settings.is_causal, *window, settings.softcap


class Flash2Varlen(Flash2):
    """The variable-length kernel for every call."""

    always_varlen: ClassVar[bool] = True
