"""Calls of SageAttention's functions, on the stream that they launch on, and the operators for compiled graphs.

The package launches its CUDA kernels on the default stream of the device, whatever stream is current. So a call on
another stream runs on the default stream, and both streams wait for each other; otherwise the kernels would read
unfinished inputs. A CUDA graph capture would record everything except these kernels, so it is refused. The Triton
variant launches on the current stream and can be captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionProviderError
from .devices import device_of

TRITON = "sageattn_qk_int8_pv_fp16_triton"
"""Name of the function that launches on the current stream."""

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions in use, by source and name: "hub:sageattn". Operators take strings, and look functions up here."""

# With this tag the compiler does not capture an operator into its CUDA graphs.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kernel: str,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    smooth_k: bool | None,
    qk_quant_gran: str | None,
    pv_accum_dtype: str | None,
) -> tuple[Tensor, Tensor]:
    options = {
        "attn_mask": mask, "smooth_k": smooth_k, "qk_quant_gran": qk_quant_gran, "pv_accum_dtype": pv_accum_dtype,
    }  # fmt: skip
    given = {name: option for name, option in options.items() if option is not None}
    call = functools.partial(
        FUNCTIONS[kernel], query, key, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale,
        return_lse=return_lse, **given,
    )  # fmt: skip
    # The package changes the current device; this restores it.
    with device_of(query):
        by_package = kernel.endswith(TRITON) or not query.is_cuda
        result = call() if by_package else _on_default_stream(call)
    return result if return_lse else (result, query.new_empty(0, dtype=torch.float32))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    max_query: int,
    max_key: int,
    kernel: str,
    is_causal: bool,
    scale: float,
    smooth_k: bool | None,
) -> Tensor:
    given = {} if smooth_k is None else {"smooth_k": smooth_k}
    call = functools.partial(
        FUNCTIONS[kernel], query, key, value, cu_query, cu_key, max_query, max_key, is_causal=is_causal,
        sm_scale=scale, **given,
    )  # fmt: skip
    with device_of(query):
        return _on_default_stream(call) if query.is_cuda else call()


def _on_default_stream(call: Callable[[], Any]) -> Any:
    """`call()` on the default stream of the current device, ordered after and before the current stream's work."""
    if torch.cuda.is_current_stream_capturing():
        raise AttentionProviderError(
            "SageAttention cannot be captured in a CUDA graph: its kernels are launched on the default stream, so the "
            "graph would replay without them. Capture with an exact provider or '_sage_qk_int8_pv_fp16_triton', or run "
            "this one outside the graph."
        )
    current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
    if current == default:
        return call()
    default.wait_stream(current)
    with torch.cuda.stream(default):
        result = call()
    current.wait_stream(default)
    for tensor in result if isinstance(result, tuple) else (result,):
        # Allocated on the default stream, which must not reuse the memory while the caller's still reads it.
        tensor.record_stream(current)
    return result


dense_op = torch.library.custom_op("diffusers_attn::sage", dense, mutates_args=(), tags=_TAGS)
varlen_op = torch.library.custom_op("diffusers_attn::sage_varlen", varlen, mutates_args=(), tags=_TAGS)


@dense_op.register_fake
def _(query, key, value, mask, kernel, is_causal, scale, return_lse, *options):  # type: ignore[no-untyped-def]
    batch, query_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, query_len) if return_lse else (0,), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@varlen_op.register_fake
def _(query, key, value, *constants):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)
