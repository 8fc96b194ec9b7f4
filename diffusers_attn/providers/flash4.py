"""FlashAttention-4: written in CuTe DSL and compiled for each kind of call on first use.

The package launches its kernels from Python, which Dynamo cannot trace. So a compiled graph contains the operators
below, and an eager call uses the package directly.

A key mask becomes lengths, as for the other FlashAttentions, but every sample keeps its own positions: the query stays
dense, and blocks of dropped keys cost nothing. The kernel reads any other bool mask entry by entry (`mask_mod`), and
does not expand it in memory.
"""

from __future__ import annotations

import contextlib
from typing import Any

import cutlass
import torch
from cutlass import cute
from flash_attn.cute import utils
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from ..masks import MaskKind
from . import varlen
from .base import Adapter, Params
from .flash_family import FlashSettings, Gradients


class Flash4(Adapter):
    """The kernel gives zeros and an lse of -inf in rows without keys, and its backward accepts that lse."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        key, value, lengths, entries, _ = _lower_mask(key, value, mask, params)
        run = forward_op if torch.compiler.is_compiling() else _forward
        out, lse = run(query, key, value, lengths, entries, *_constants(params))
        return out, lse.transpose(1, 2)

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
        packed_key, packed_value, lengths, entries, packing = _lower_mask(key, value, mask, params)
        lse = lse.transpose(1, 2).contiguous()
        run = backward_op if torch.compiler.is_compiling() else _backward
        deterministic = FlashSettings.of(params).deterministic
        grad_query, grad_key, grad_value = run(
            grad_out, query, packed_key, packed_value, out, lse, lengths, entries, *_constants(params), deterministic
        )
        if packing is None:
            return grad_query, grad_key, grad_value
        grad_key, grad_value = (
            varlen.unpack_gradient(grad.flatten(0, 1), packing, like)
            for grad, like in ((grad_key, key), (grad_value, value))
        )
        return grad_query, grad_key, grad_value


def _lower_mask(
    key: Tensor, value: Tensor, mask: Tensor | None, params: Params
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, varlen.KeyPacking | None]:
    """Key, value, the number of kept keys, the mask that the kernel reads, and the packing of the keys."""
    if mask is None:
        return key, value, None, None, None
    if params.mask_kind != MaskKind.KEY:
        # Bytes, because CuTe has no bool in memory. (Inductor cannot view a bool as another dtype; it fuses the copy.)
        (entries,) = varlen.rows_contiguous(mask)
        compiling = torch.compiler.is_compiling()
        return key, value, None, entries.to(torch.uint8) if compiling else entries.view(torch.uint8), None
    packing = varlen.pack_keys(mask, key.shape[0], key.shape[1], across_batch=False)
    packed_key, packed_value = (varlen.pack(tensor, packing).view(tensor.shape) for tensor in (key, value))
    return packed_key, packed_value, packing.lengths, None, packing


def _constants(params: Params) -> tuple[float, bool, int, int, float]:
    """scale, is_causal, window_left, window_right, softcap."""
    settings = FlashSettings.of(params)
    return settings.scale, settings.is_causal, *settings.window, settings.softcap


@cute.jit
def _entry_of_mask(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """The kernel's `mask_mod`: whether `query` sees `key`. At module level: the package caches kernels by its source.

    The last tile reaches past the sequences. Its results there are dropped, but the entries that it reads must exist.
    """
    query_index = cutlass.min(query[0], seqlen_info.seqlen_q - 1)
    key_index = cutlass.min(key[0], seqlen_info.seqlen_k - 1)
    entry = cutlass.Int32(aux_tensors[0][batch[0], head[0], query_index, key_index])
    return utils.scalar_to_ssa(entry, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


def _mask_arguments(query: Tensor, key: Tensor, entries: Tensor | None) -> dict[str, Any]:
    if entries is None:
        return {}
    shape = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    return {"mask_mod": _entry_of_mask, "aux_tensors": [entries.expand(shape)]}


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The package launches on the current device, whatever device its tensors are on."""
    same = tensor.get_device() == torch.cuda.current_device()
    return contextlib.nullcontext() if same else torch.cuda.device(tensor.device)


def _limit(window: int) -> int | None:
    return None if window < 0 else window


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    entries: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    with _on_device_of(query):
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, seqused_k=lengths, softmax_scale=scale, causal=is_causal, softcap=softcap,
            window_size_left=_limit(window_left), window_size_right=_limit(window_right), return_lse=True,
            **_mask_arguments(query, key, entries),
        )  # fmt: skip
    return out, lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    entries: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
) -> Gradients:
    grad_query, grad_key, grad_value = _empty_gradients(query, key, value)
    with _on_device_of(query):
        _flash_attn_bwd(
            query, key, value, out, grad_out, lse, scale, is_causal, softcap, seqused_k=lengths,
            window_size_left=_limit(window_left), window_size_right=_limit(window_right), deterministic=deterministic,
            dq=grad_query, dk=grad_key, dv=grad_value, **_mask_arguments(query, key, entries),
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> Gradients:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


# In a compiled graph: the package's own functions do not trace.
forward_op = torch.library.custom_op("diffusers_attn::flash_4", _forward, mutates_args=(), device_types="cuda")
backward_op = torch.library.custom_op(
    "diffusers_attn::flash_4_backward", _backward, mutates_args=(), device_types="cuda"
)


@forward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    batch, query_len, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, query_len), dtype=torch.float32)


@backward_op.register_fake
def _(grad_out, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return _empty_gradients(query, key, value)
