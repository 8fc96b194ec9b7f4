"""Kinds of calls that were checked and decided before: a call of such a kind needs neither again.

A small call of `native` on a CPU takes 3.4 µs longer than PyTorch's function with this table, and 41.5 µs longer if the
table is emptied before it (`benchmarks/dispatch_overhead.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .prepared_call import PreparedCall
from .shapes import Layout
from .tensor_kinds import no_transform

if TYPE_CHECKING:
    from .scope import ProviderChoice

prepared: dict[tuple[object, ...] | None, PreparedCall] = {}
"""How calls are served, by their signature."""
_MOST = 4096
"""Number of kinds that are kept. A program with changing lengths may have any number of kinds."""
# Looked up once, because they are used in every call.
_is_grad_enabled = torch.is_grad_enabled
_strided = torch.strided


def keep(signature: tuple[object, ...], call: PreparedCall) -> None:
    """Keeps how calls of this signature are served."""
    if len(prepared) >= _MOST:
        prepared.clear()
    prepared[signature] = call


def signature(
    choice: ProviderChoice,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[object, ...] | None:
    """All that a check or a decision can depend on, outside of a traced graph.

    None for a call that needs a closer look: its tensors are not plain, or differ in dtype or device, or a flag is no
    bool.

    It is one function, written for speed: it runs in every call.
    """
    if not (
        type(query) is type(key) is type(value) is Tensor
        and query.layout is key.layout is value.layout is _strided
        and (is_causal is False or is_causal is True)
        and (enable_gqa is False or enable_gqa is True)
        and no_transform()
    ):
        return None
    dtype, device = query.dtype, query.device
    if not (dtype is key.dtype is value.dtype and device == key.device == value.device):
        return None
    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and (query.requires_grad or key.requires_grad or value.requires_grad)
    about_mask: object = None
    try:
        if type(mask) is Tensor:
            if mask.layout is not _strided:
                return None
            about_mask = mask.shape, mask.stride(), mask.dtype, mask.device, grad_enabled and mask.requires_grad
        elif isinstance(mask, Tensor):
            return None
        elif mask is not None:
            about_mask = type(mask)
        return (
            choice, layout, query.shape, key.shape, value.shape, dtype, device, dropout_p, is_causal, scale,
            enable_gqa, needs_grad, about_mask,
        )  # fmt: skip
    except RuntimeError:  # a nested tensor of type torch.Tensor has no shape
        return None
