"""`core` of SageAttention/sage-attention, on the CPU and without quantising."""

from typing import Any

from torch import Tensor

from . import attention


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    assert tensor_layout == "NHD" and not kwargs
    out, lse = attention.forward(q, k, v, sm_scale, is_causal)
    return (out, lse) if return_lse else out
