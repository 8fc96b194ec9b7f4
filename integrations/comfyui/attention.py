"""An attention function for ComfyUI's hook `optimized_attention_override`.

ComfyUI calls its attention as `attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **more)`. If a model's transformer options contain "optimized_attention_override", it calls
`override(attention, q, k, v, heads, ...)` instead. `AttentionOverride` is such a function: it computes the call with
`diffusers_attn.attention_dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.providers.catalog import SPECS

HOOK = "optimized_attention_override"
"""The key of the override in a model's transformer options."""

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class AttentionOverride:
    """ComfyUI's attention, computed by a provider.

    Args:
        provider: name of the provider.
        options: options of `attention_provider`, such as `source="hub"`.
        refused: what happens to a call that the provider cannot compute exactly: "error", or "comfyui", which computes
            this call with ComfyUI's own attention.
        earlier: an override that the model already had. It is called with this attention in the place of ComfyUI's, so
            that nodes that change queries, keys or masks keep working.
    """

    provider: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str = "error"
    earlier: Callable[..., Tensor] | None = None

    @property
    def is_lossy(self) -> bool:
        """Whether the provider computes with less precision than its inputs have, as sage does."""
        return self.provider in SPECS and not SPECS[self.provider].capabilities.exact

    def __call__(self, attention: Attention, *args: Any, **kwargs: Any) -> Tensor:
        def ours(*args: Any, **kwargs: Any) -> Tensor:
            return self._compute(attention, *args, **kwargs)

        return ours(*args, **kwargs) if self.earlier is None else self.earlier(ours, *args, **kwargs)

    def _compute(
        self,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> Tensor:
        """Attention in ComfyUI's layouts.

        Args:
            attention: ComfyUI's own attention.
            q: `[batch, query_len, heads * head_dim]`; with `skip_reshape` `[batch, heads, query_len, head_dim]`.
            k: likewise, of `key_len`.
            v: likewise, of `key_len`.
            heads: number of heads.
            mask: bool (True takes part) or floating (added to the scores), `[query_len, key_len]`,
                `[batch, query_len, key_len]` or `[batch, heads, query_len, key_len]`.
            attn_precision: float32 if the model needs scores in float32. Exact providers compute them so; calls of a
                lossy provider then go to ComfyUI's attention.
            skip_reshape: whether heads are a dimension of `q`, `k` and `v`.
            skip_output_reshape: whether heads are to be a dimension of the result.
            more: further arguments of ComfyUI: `scale`, `enable_gqa`, and `low_precision_attention=False`, which has
                the same meaning as `attn_precision=torch.float32`.
        """

        def by_comfyui() -> Tensor:
            return attention(
                q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape, **more,
            )  # fmt: skip

        needs_exact = attn_precision == torch.float32 or more.get("low_precision_attention") is False
        if needs_exact and self.is_lossy:
            return by_comfyui()
        if skip_reshape:
            query, key, value = q, k, v
        else:
            head_dim = q.shape[-1] // heads
            query, key, value = (each.unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in (q, k, v))
        try:
            with attention_provider(self.provider, **self.options):
                output = attention_dispatch(
                    query,
                    key,
                    value,
                    attn_mask=_broadcastable(mask),
                    scale=more.get("scale"),
                    enable_gqa=bool(more.get("enable_gqa", False)),
                )
        except AttentionProviderError as error:
            if self.refused == "comfyui":
                return by_comfyui()
            raise AttentionProviderError(
                f'{error} Or set refused_calls of the node to "comfyui": ComfyUI then computes such calls itself.'
            ) from error
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def _broadcastable(mask: Tensor | None) -> Tensor | None:
    """A mask of 2, 3 or 4 dimensions as `[batch, heads, query_len, key_len]`, where sizes may be 1."""
    if mask is None or mask.ndim == 4:
        return mask
    if mask.ndim not in (2, 3):
        raise AttentionProviderError(f"A mask has 2, 3 or 4 dimensions, and this one is {list(mask.shape)}.")
    return mask[:, None] if mask.ndim == 3 else mask[None, None]
