"""SageAttention 3 (arXiv 2505.11594), from its package or from the Hub: scores and weights in FP4. Lossy, and forward
only, without an lse. For consumer Blackwell GPUs.

The package's function has no scale: it takes `head_dim ** -0.5`. For another scale, the query is multiplied by the
ratio of the two. The function subtracts the mean of the keys in place, so it gets a copy. It ignores a mask, and calls
PyTorch's attention for a head_dim of 256 or more; the catalog allows neither. It launches on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Adapter, Params
from .devices import device_of

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
"""The functions in use, by source. The operator takes a string, and looks the function up here."""


class Sage3(Adapter):
    """The function takes heads before lengths."""

    layout = "bhsd"
    source: ClassVar[str]

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        _FUNCTIONS[source] = package.sageattn3_blackwell  # type: ignore[union-attr]
        return type(cls.__name__, (cls,), {"source": source})

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        if not params.default_scale:
            query = query * (params.scale * query.shape[-1] ** 0.5)
        run = dense_op if torch.compiler.is_compiling() else _dense
        return run(query, key, value, cls.source, params.is_causal)

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        """The package gives no lse: the second tensor is empty."""
        return cls.attention(query, key, value, mask, params=params), query.new_empty(0, dtype=torch.float32)


def _dense(query: Tensor, key: Tensor, value: Tensor, source: str, is_causal: bool) -> Tensor:
    key = key.clone(memory_format=torch.contiguous_format)
    with device_of(query):
        return _FUNCTIONS[source](query.contiguous(), key, value.contiguous(), is_causal=is_causal)


dense_op = torch.library.custom_op("diffusers_attn::sage_3", _dense, mutates_args=())


@dense_op.register_fake
def _(query, key, value, source, is_causal):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)
