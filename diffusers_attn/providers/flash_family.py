"""The common part of FlashAttention-2 and -3: a dense kernel, and a variable-length kernel that serves key masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import AttentionProviderError
from . import varlen
from .base import Adapter, Params

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashSettings(NamedTuple):
    """The constants of a call in the form that the kernels take."""

    scale: float
    is_causal: bool
    window: tuple[int, int]
    """Visible keys to the left and right of a query's position; -1 is unlimited."""
    softcap: float
    deterministic: bool

    @staticmethod
    def of(params: Params) -> FlashSettings:
        options = dict(params.options)
        window = options.get("window_size", (-1, -1))
        if len(window) != 2 or not all(isinstance(limit, int) for limit in window):
            raise AttentionProviderError(
                f"option window_size={window!r}: two whole numbers, (left, right), are accepted; -1 is unlimited."
            )
        softcap = float(options.get("softcap", 0.0))
        return FlashSettings(params.scale, params.is_causal, window, softcap, options.get("deterministic", False))


def takes_window_pair(function: Callable[..., Any]) -> bool:
    """Whether a function of a package takes the window as one pair, as versions before operators did."""
    return "window_size" in inspect.signature(function).parameters


def call_kernel(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `kernel`. Raises AttentionProviderError for a feature that the installed build was compiled without."""
    try:
        return kernel(*args, **kwargs)
    except RuntimeError as error:
        if "flash attention build does not support" not in str(error):
            raise
        raise AttentionProviderError(
            f"{str(error).splitlines()[0]} The installed flash-attn was compiled without it: leave that option out, or "
            "install a build that has it."
        ) from error


class SequenceLengths(NamedTuple):
    """The cu_seqlens and maximal lengths of a batch for a variable-length kernel."""

    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


class FlashAttention(Adapter):
    """The adapter. A subclass adds the kernels, which are variable-length ones where lengths are given."""

    always_varlen: ClassVar[bool] = False

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        settings = FlashSettings.of(params)
        query, key, value = varlen.rows_contiguous(query, key, value)
        if mask is None and not cls.always_varlen:
            out, lse = cls.run(query, key, value, None, settings)
            return out, lse.transpose(1, 2)
        packed_key, packed_value, lengths, _ = pack(query, key, value, mask)
        out, lse = cls.run(query.flatten(0, 1), packed_key, packed_value, lengths, settings)
        return unpack_results(out, lse, query.shape)

    @classmethod
    def backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        out: Tensor,
        lse: Tensor,
        params: Params,
    ) -> Gradients:
        settings = FlashSettings.of(params)
        grad_out, query, key, value, out = varlen.rows_contiguous(grad_out, query, key, value, out)
        # The weights are exp(score - lse): with +inf they are zero in a row without keys.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        if mask is None and not cls.always_varlen:
            lse = lse.transpose(1, 2).contiguous()
            return cls.run_backward(grad_out, query, key, value, out, lse, None, settings)
        packed_key, packed_value, lengths, packing = pack(query, key, value, mask)
        grad_query, grad_key, grad_value = cls.run_backward(
            grad_out.flatten(0, 1), query.flatten(0, 1), packed_key, packed_value, out.flatten(0, 1),
            lse.permute(2, 0, 1).flatten(1).contiguous(), lengths, settings,
        )  # fmt: skip
        grad_query = grad_query.view(query.shape)
        if packing is None:
            return grad_query, grad_key.view(key.shape), grad_value.view(value.shape)
        grad_key = varlen.unpack_gradient(grad_key, packing, key)
        return grad_query, grad_key, varlen.unpack_gradient(grad_value, packing, value)

    @classmethod
    def run(
        cls, query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths | None, settings: FlashSettings
    ) -> tuple[Tensor, Tensor]:
        """Output and lse.

        Without lengths, the output is `[batch, query_len, heads, head_dim]` and the lse `[batch, heads, query_len]`;
        with lengths `[batch * query_len, heads, head_dim]` and `[heads, batch * query_len]`.
        """
        raise NotImplementedError

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
        """The gradients, from the results of `run`. Positions outside of all sequences are not written."""
        raise NotImplementedError


def unpack_results(out: Tensor, lse: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The results of `run` with lengths, for a query of `shape`, as those of an adapter."""
    batch, query_len, heads, _ = shape
    # FlashAttention-2 returns +inf for a sequence without keys.
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    return out.view(shape), lse.view(heads, batch, query_len).permute(1, 2, 0)


def pack(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, SequenceLengths, varlen.KeyPacking | None]:
    """Key and value with a flattened batch, the lengths, and the packing of the keys (None without a mask)."""
    batch, query_len = query.shape[:2]
    key_len = key.shape[1]
    cu_query = varlen.equal_lengths(batch, query_len, query.device)
    if mask is None:
        cu_key = varlen.equal_lengths(batch, key_len, query.device)
        return key.flatten(0, 1), value.flatten(0, 1), SequenceLengths(cu_query, cu_key, query_len, key_len), None
    packing = varlen.pack_keys(mask, batch, key_len, across_batch=True)
    lengths = SequenceLengths(cu_query, varlen.cumulative(packing.lengths), query_len, key_len)
    return varlen.pack(key, packing), varlen.pack(value, packing), lengths, packing
