"""AnyFlow FAR over several ranks: attention to chunks of frames and to a cache of earlier chunks.

diffusers' processor slices keys for its cache by positions in the full sequence, pads queries and keys to a multiple of
128, and masks them with a BlockMask over the full sequence. The code here replaces it over several ranks. The cache
stores the keys of all ranks, equal on every rank; and each rank takes its queries' rows of the mask. On one device,
diffusers' own code runs.

A step that reads the cache has no mask. The zeros that pad the keys then take part in attention, as in diffusers: they
are part of the model's definition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..context_parallel.sequences.active import active
from ..errors import AttentionProviderError
from ..masks import MaskKind
from ..providers.catalog import SPECS
from ..scope import ProviderChoice, active_choice
from .overlay import Overlay

PROCESSOR = "diffusers.models.transformers.transformer_anyflow_far.AnyFlowCausalAttnProcessor"
BLOCK = 128


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """The methods of a bound processor that replace `upstream`, the `__call__` of diffusers' processor."""
    return {
        "__call__": overlay.rebuild(cast(FunctionType, _call)),
        "on_one_device": overlay.rebuild(upstream),
        "rotate": staticmethod(upstream.__globals__["apply_rotary_emb"]),
    }


def _call(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Any = None,
    rotary_emb: dict[str, Tensor] | None = None,
    kv_cache: dict[str, Tensor] | None = None,
    kv_cache_flag: dict[str, Any] | None = None,
) -> Tensor:
    """Same as diffusers' processor, with the same arguments. Over several ranks these are:

    Args:
        hidden_states: this rank's tokens, `[batch, tokens, channels]`.
        attention_mask: a BlockMask over the tokens of all ranks, padded to complete blocks.
        rotary_emb: "query", `[1, 1, tokens, head_dim / 2]`, and "key", the same after the entries of all cached tokens.
        kv_cache: "compressed_cache" and "full_cache", `[2, batch, heads, places, head_dim]`, of the full sequence.

    Raises:
        AttentionProviderError: the mask is for another number of tokens.
    """
    tracker = active.tracker
    names = () if tracker is None or tracker.role is None else tracker.present(tracker.role.query)
    if tracker is None or tracker.mesh.size == 1 or not names or self._attention_backend != "flex":
        return self.on_one_device(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, kv_cache, kv_cache_flag
        )
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    # [batch, heads, tokens, head_dim], like caches and rotary embeddings.
    query, key, value = (
        each.to(hidden_states.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value)
    )
    shards = tracker.shards(names)
    if kv_cache is not None and kv_cache_flag is not None:
        if kv_cache_flag["is_cache_step"]:
            _fill(kv_cache, kv_cache_flag, tracker.gather(names, key, 2), tracker.gather(names, value, 2))
        else:
            cached = [_cached(kv_cache, kv_cache_flag, part) for part in (0, 1)]
            key, value = torch.cat([cached[0], key], dim=2), torch.cat([cached[1], value], dim=2)
    if rotary_emb is not None:
        query, key = self.rotate(query, rotary_emb["query"]), self.rotate(key, rotary_emb["key"])
    rows = backend = None
    if attention_mask is not None:
        rows = tracker.once(
            attention_mask, lambda: _rows(attention_mask, shards.spans[tracker.mesh.rank], shards.total)
        )
        # diffusers always requests flex. Without a mask, every provider can serve the call.
        backend = None if _takes_rows(active_choice(self.choice)) else "flex"
    elif -shards.total % BLOCK:
        # The padding comes first, like all keys that every rank has.
        key, value = (
            torch.cat([each.new_zeros(*each.shape[:2], -shards.total % BLOCK, each.shape[3]), each], dim=2)
            for each in (key, value)
        )
    out = dispatch_attention_fn(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=rows,
        backend=backend,  # type: ignore[arg-type]
        parallel_config=self._parallel_config,
    )
    out = out.flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](out))


def _fill(cache: dict[str, Tensor], flag: dict[str, Any], key: Tensor, value: Tensor) -> None:
    """Writes the keys and values of all tokens into the cache, compressed frames first."""
    compressed, full = flag["num_compressed_tokens"], flag["num_full_tokens"]
    for part, tokens in enumerate((key, value)):
        cache["compressed_cache"][part, :, :, :compressed] = tokens[:, :, :compressed]
        cache["full_cache"][part, :, :, :full] = tokens[:, :, compressed:]


def _cached(cache: dict[str, Tensor], flag: dict[str, Any], part: int) -> Tensor:
    compressed, full = flag["num_cached_compressed_tokens"], flag["num_cached_full_tokens"]
    return torch.cat(
        [cache["compressed_cache"][part, :, :, :compressed], cache["full_cache"][part, :, :, :full]], dim=2
    )


def _rows(mask: Any, spans: tuple[tuple[int, int], ...], total: int) -> Tensor:
    """The rows of this rank's queries over all keys, from a BlockMask over the full sequence."""
    from ..context_parallel.sequences.block_masks import rows_of

    places = -(-total // BLOCK) * BLOCK
    if type(mask).__name__ != "BlockMask" or tuple(mask.shape[-2:]) != (places, places) or mask.shape[1] != 1:
        given = f" of shape {list(mask.shape)}" if hasattr(mask, "shape") else ""
        raise AttentionProviderError(
            f"attention_mask is a {type(mask).__name__}{given}; over several ranks a BlockMask of shape [1, 1, "
            f"{places}, {places}] is accepted, for {total} tokens in blocks of {BLOCK}. Leave it out, or make it with "
            "model.build_attention_mask for these chunks and sizes."
        )
    ((start, length),) = spans
    return rows_of(mask, start, length, total)


def _takes_rows(choice: ProviderChoice) -> bool:
    return choice.provider == "auto" or MaskKind.DENSE in SPECS[choice.provider].capabilities.masks
