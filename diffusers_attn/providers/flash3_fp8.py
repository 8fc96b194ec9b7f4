"""FlashAttention-3 on float8 inputs. Lossy, forward only, for Hopper.

Query, key and value are quantised here (`fp8.py`). The kernel multiplies by their factors, so its lse is that of the
quantised scores. Its output is bfloat16. Over several ranks each rank quantises its own keys, with its own factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fp8
from .base import Params
from .flash3 import Flash3
from .flash_family import FlashSettings, pack, unpack_results


class Flash3Fp8(Flash3):
    """A key mask becomes lengths, as for the other FlashAttentions."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        settings, dtype, kv_heads = FlashSettings.of(params), query.dtype, key.shape[2]
        query, query_factor = fp8.quantize(query, kv_heads)
        key, key_factor = fp8.quantize(key, kv_heads, mask)
        value, value_factor = fp8.quantize(value, kv_heads, mask)
        factors = {"q_descale": query_factor, "k_descale": key_factor, "v_descale": value_factor}
        if mask is None:
            out, lse = cls.run(query, key, value, None, settings, **factors)
            return out.to(dtype), lse.transpose(1, 2)
        # Packed as bytes: not every operator takes float8.
        packed_key, packed_value, lengths, _ = pack(query, key.view(torch.uint8), value.view(torch.uint8), mask)
        out, lse = cls.run(
            query.flatten(0, 1), packed_key.view(fp8.DTYPE), packed_value.view(fp8.DTYPE), lengths, settings, **factors
        )
        return unpack_results(out.to(dtype), lse, query.shape)
