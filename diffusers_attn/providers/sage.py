"""SageAttention 2 (arXiv 2411.10958), from its package or from the Hub: int8 scores, fp8 or fp16 values. Lossy, and
forward only.

`sage_calls` calls the package's functions. With `smooth_k` the package subtracts the mean of the keys, and corrects its
lse for it.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import masks
from . import sage_calls, varlen
from .base import Adapter, Params

TILE = 64
"""Keys in one tile of the fp16 CUDA kernel."""


class _FromPackage(Adapter):
    """An adapter of one function of the package."""

    kernel: ClassVar[str]
    """Name of the function; in an adapter made by `over`, its key in `sage_calls.FUNCTIONS`."""
    core: ClassVar[Any]
    """The module with the functions, and with flags for the compiled modules that were found."""

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        # The kernel on the Hub has the package's module `core`, and may export functions of it too.
        core = getattr(package, "core", package)
        key = f"{source}:{cls.kernel}"
        sage_calls.FUNCTIONS[key] = getattr(core, cls.kernel, None) or getattr(package, cls.kernel)
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
        run = sage_calls.dense_op if torch.compiler.is_compiling() else sage_calls.dense
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

    kernel = sage_calls.TRITON


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
        run = sage_calls.varlen_op if torch.compiler.is_compiling() else sage_calls.varlen
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
