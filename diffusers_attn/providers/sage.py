"""SageAttention 2 (arXiv 2411.10958), from its package or from the Hub: int8 scores, fp8 or fp16 values. Lossy, and
forward only.

The package launches its CUDA kernels on the default stream of the device, whatever stream is current. So a call on
another stream runs on the default stream, and both streams wait for each other; otherwise the kernels would read
unfinished inputs. A CUDA graph capture would record everything except these kernels, so it is refused. The Triton
variant launches on the current stream and can be captured.

With `smooth_k` the package subtracts the mean of the keys, and corrects its lse for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import masks
from ..errors import AttentionProviderError
from . import varlen
from .base import Adapter, Params
from .devices import device_of

TILE = 64
"""Keys in one tile of the fp16 CUDA kernel."""

# With this tag the compiler does not capture an operator into its CUDA graphs.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions in use, by source and name: "hub:sageattn". Operators take strings, and look functions up here."""


class _FromPackage(Adapter):
    """An adapter of one function of the package."""

    kernel: ClassVar[str]
    """Name of the function; in an adapter made by `over`, its key in `_FUNCTIONS`."""
    core: ClassVar[Any]
    """The module with the functions, and with flags for the compiled modules that were found."""

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        # The kernel on the Hub has the package's module `core`, and may export functions of it too.
        core = getattr(package, "core", package)
        key = f"{source}:{cls.kernel}"
        _FUNCTIONS[key] = getattr(core, cls.kernel, None) or getattr(package, cls.kernel)
        return type(cls.__name__, (cls,), {"kernel": key, "core": core})


class SageAttention(_FromPackage):
    """The common part of the adapters for dense calls."""

    extensions: ClassVar[dict[tuple[int, int] | None, str]] = {}
    """The compiled module of the package that is needed, by compute capability; None is for all others."""

    @classmethod
    def extension(cls, device: torch.device) -> str | None:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls.extensions.get(capability, cls.extensions.get(None))

    @classmethod
    def check_device(cls, device: torch.device) -> str | None:
        needed = cls.extension(device)
        # The package imports without its missing modules, and fails with an assertion when it is called.
        if needed is None or getattr(cls.core, f"{needed}_ENABLED", True):
            return None
        return (
            f"the installed sageattention was built without its {needed} kernels (rebuild it with this GPU's compute "
            "capability in TORCH_CUDA_ARCH_LIST)"
        )

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        return cls.run(query, key, value, mask, params, return_lse=False)[0]

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        out, lse = cls.run(query, key, value, mask, params, return_lse=True)
        return out, lse.transpose(1, 2)

    @classmethod
    def run(
        cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: Params, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Output, and lse `[batch, heads, query_len]`, which is empty unless asked for."""
        options = dict(params.options)
        query_len, key_len = query.shape[1], key.shape[1]
        if key_len < TILE and cls.extension(query.device) == "SM80":
            query, key, value = filled_tile(query, key, value, params.is_causal)
        query, key, value = varlen.rows_contiguous(query, key, value)
        run = dense_op if torch.compiler.is_compiling() else _dense
        out, lse = run(
            query, key, value, mask, cls.kernel, params.is_causal, params.scale, return_lse, options.get("smooth_k"),
            options.get("qk_quant_gran"), options.get("pv_accum_dtype"),
        )  # fmt: skip
        if key.shape[1] != key_len:
            out = out[:, :query_len]
            if return_lse:
                lse = lse[..., :query_len] - (0.0 if params.is_causal else math.log(key.shape[1] // key_len))
        if mask is None:
            return out, lse
        # The kernel's mask is a large negative number: a row without keys attends to all of them.
        dead = masks.dead_rows(mask)
        out = out.masked_fill(dead.transpose(1, 2), 0.0)
        return out, lse.masked_fill(dead.squeeze(-1), -math.inf) if return_lse else lse


def filled_tile(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Equivalent inputs with at least one full tile of keys. The fp16 CUDA kernel multiplies the shared memory behind
    the last key by weights of zero, and before the first tile is full that memory may hold the NaN of another kernel.

    The keys are repeated, which does not change the output and adds the logarithm of the number of copies to the lse.
    In causal attention (with equal lengths) zeros are appended instead, which only appended queries see.
    """
    if is_causal:
        behind = (0, 0, 0, 0, 0, TILE - key.shape[1])
        return pad(query, behind), pad(key, behind), pad(value, behind)
    times = -(-TILE // key.shape[1])
    return query, key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1)


class Sage(SageAttention):
    """The function with which the package chooses a kernel for the GPU."""

    kernel = "sageattn"
    extensions = {(8, 0): "SM80", (8, 9): "SM89", (9, 0): "SM90", (12, 0): "SM89"}


class Fp8Cuda(SageAttention):
    kernel = "sageattn_qk_int8_pv_fp8_cuda"
    extensions = {None: "SM89"}


class Fp8CudaSm90(SageAttention):
    kernel = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    extensions = {None: "SM90"}


class Fp16Cuda(SageAttention):
    kernel = "sageattn_qk_int8_pv_fp16_cuda"
    extensions = {None: "SM80"}


class Fp16Triton(SageAttention):
    """The only variant that takes a mask, which the kernel reads."""

    kernel = "sageattn_qk_int8_pv_fp16_triton"


class SageVarlen(_FromPackage):
    """Key masks become lengths (`varlen.py`). A call synchronises with the device: the package allocates by lengths."""

    kernel = "sageattn_varlen"

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        batch, query_len = query.shape[:2]
        key_len = key.shape[1]
        query, key, value = varlen.rows_contiguous(query, key, value)
        cu_query = varlen.equal_lengths(batch, query_len, query.device)
        if mask is None:
            packed_key, packed_value = key.flatten(0, 1), value.flatten(0, 1)
            cu_key = varlen.equal_lengths(batch, key_len, query.device)
        else:
            packing = varlen.pack_keys(mask, batch, key_len, across_batch=True)
            packed_key, packed_value = varlen.pack(key, packing), varlen.pack(value, packing)
            cu_key = varlen.cumulative(packing.lengths)
        run = varlen_op if torch.compiler.is_compiling() else _varlen
        smooth_k = dict(params.options).get("smooth_k")
        out = run(
            query.flatten(0, 1), packed_key, packed_value, cu_query, cu_key, query_len, key_len, cls.kernel,
            params.is_causal, params.scale, smooth_k,
        )  # fmt: skip
        return out.view(query.shape)

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        """The package gives no lse for this kernel: the second tensor is empty."""
        return cls.attention(query, key, value, mask, params=params), query.new_empty(0, dtype=torch.float32)


def _dense(
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
        _FUNCTIONS[kernel], query, key, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale,
        return_lse=return_lse, **given,
    )  # fmt: skip
    # The package changes the current device; this restores it.
    with device_of(query):
        by_package = kernel.endswith(Fp16Triton.kernel) or not query.is_cuda
        result = call() if by_package else _on_default_stream(call)
    return result if return_lse else (result, query.new_empty(0, dtype=torch.float32))


def _varlen(
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
        _FUNCTIONS[kernel], query, key, value, cu_query, cu_key, max_query, max_key, is_causal=is_causal,
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


@torch.library.custom_op("diffusers_attn::sage", mutates_args=(), tags=_TAGS)
def dense_op(
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
    return _dense(
        query, key, value, mask, kernel, is_causal, scale, return_lse, smooth_k, qk_quant_gran, pv_accum_dtype
    )


@dense_op.register_fake
def _(query, key, value, mask, kernel, is_causal, scale, return_lse, *options):  # type: ignore[no-untyped-def]
    batch, query_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, query_len) if return_lse else (0,), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.custom_op("diffusers_attn::sage_varlen", mutates_args=(), tags=_TAGS)
def varlen_op(
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
    return _varlen(query, key, value, cu_query, cu_key, max_query, max_key, kernel, is_causal, scale, smooth_k)


@varlen_op.register_fake
def _(query, key, value, *constants):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)
