"""Wan Animate 2 over several ranks: attention to the video and, frame by frame, to a cache of reference keys.

diffusers' processor applies rotary embeddings by position in the full sequence. In the pass that uses the cache, it
scatters all tokens into buffers for the largest video and masks them with a BlockMask. The code here replaces it over
several ranks:

- A rank rotates its tokens by their positions in the full sequence.
- Its cache stores its shard of the reference keys. A full cache that was filled on one device works too.
- Rectangles replace the BlockMask: [all queries, the entire video] and [a frame's queries, the reference of the frame
  before]. Each is an attention call without a mask.

On one device, diffusers' own code runs.

If a video or its reference is smaller than the mask's size, some places in diffusers' buffers are empty, and their
zeros take part in attention. They do so here too, since they are part of the model's definition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..context_parallel.sequences.active import active
from ..context_parallel.sequences.rectangles import Rectangle
from ..errors import AttentionProviderError
from .overlay import Overlay

PROCESSOR = "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2AttnProcessor"


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """The methods of a bound processor that replace `upstream`, the `__call__` of diffusers' processor."""
    return {
        "__call__": overlay.rebuild(cast(FunctionType, _call)),
        "on_one_device": overlay.rebuild(upstream),
        "project": staticmethod(upstream.__globals__["_get_qkv_projections"]),
    }


def _call(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    rotary_emb: Tensor,
    grid_sizes: Tensor,
    kv_cache: Any,
    kv_cache_mode: str,
    rope_stride: int = 1,
    reference_rotary_emb: Tensor | None = None,
    reference_grid_sizes: Tensor | None = None,
    reference_rope_stride: int = 1,
    attention_mask: Any = None,
    origin_latent_frames: int | None = None,
    origin_latent_hw: int | None = None,
) -> Tensor:
    """Same as diffusers' processor, with the same arguments. `hidden_states` and `kv_cache` hold this rank's tokens.

    Raises:
        AttentionProviderError: the cache has another number of tokens, or sizes do not fit together.
    """
    tracker = active.tracker
    names = () if tracker is None or tracker.role is None else tracker.present(tracker.role.query)
    if tracker is None or tracker.mesh.size == 1 or not names:
        return self.on_one_device(
            attn, hidden_states, rotary_emb, grid_sizes, kv_cache, kv_cache_mode, rope_stride, reference_rotary_emb,
            reference_grid_sizes, reference_rope_stride, attention_mask, origin_latent_frames, origin_latent_hw,
        )  # fmt: skip
    from ..context_parallel.sequences.sharded_masks import RectangleMask

    rank = tracker.mesh.rank
    query, key, value = self.project(attn, hidden_states, None)
    query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in (attn.norm_q(query), attn.norm_k(key), value))
    if kv_cache_mode == "extract":
        kv_cache.store(key, value)
    ((start, length),) = tracker.shards(names).spans[rank]
    turns = _turns(rotary_emb, grid_sizes, rope_stride, start, length)
    query, key = _rotated(query, turns), _rotated(key, turns)
    mask = None
    if kv_cache_mode == "cached":
        key_ref, value_ref = kv_cache.get()
        shards = tracker.shards(("reference",))
        ((start, length),) = shards.spans[rank]
        if key_ref.shape[1] not in (length, shards.total):
            raise AttentionProviderError(
                f"the cache holds {key_ref.shape[1]} reference tokens on rank {rank}; accepted are its shard of "
                f"{length} or all {shards.total} of reference_grid_sizes. Fill the cache again with this reference on "
                "the same number of ranks, with kv_cache_mode='extract'."
            )
        if key_ref.shape[1] != length:
            key_ref, value_ref = key_ref.narrow(1, start, length), value_ref.narrow(1, start, length)
        turns = _turns(reference_rotary_emb, reference_grid_sizes, reference_rope_stride, start, length)
        largest = cast(tuple[int, int], (origin_latent_frames, origin_latent_hw))
        empty, rectangles = _rectangles(*_frames(grid_sizes), *_frames(reference_grid_sizes), *largest)
        zeros = key.new_zeros(key.shape[0], empty, *key.shape[2:])
        key, value = torch.cat([zeros, key, _rotated(key_ref, turns)], dim=1), torch.cat([zeros, value, value_ref], 1)
        mask = RectangleMask(rectangles)
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,  # type: ignore[arg-type]
        backend=self._attention_backend,
        parallel_config=self._parallel_config,
    )
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


def _turns(angles: Any, grids: Any, stride: int, start: int, length: int) -> Tensor:
    """The rotations of a span of tokens by their frame, row and column, complex `[batch, length, 1, head_dim / 2]`."""
    channels = angles.shape[1]
    of_time, of_rows, of_columns = angles.split([channels - 2 * (channels // 3), channels // 3, channels // 3], dim=1)
    place = torch.arange(start, start + length, device=angles.device)
    turns = [
        torch.cat([of_time[place // (h * w) * stride], of_rows[place // w % h], of_columns[place % w]], dim=1)
        for _, h, w in grids.tolist()
    ]
    return torch.stack(turns)[:, :, None]


def _rotated(tensor: Tensor, turns: Tensor) -> Tensor:
    """Rotates every pair of neighbouring channels of a tensor `[batch, tokens, heads, head_dim]`, rounded as in
    diffusers."""
    turned = torch.view_as_complex(tensor.to(torch.float64).unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(turned).flatten(3).float().type_as(tensor)


def _frames(grids: Any) -> tuple[int, int]:
    """The number of frames, and of tokens per frame, of the first sample. diffusers packs all samples like it."""
    frames, height, width = grids[0].tolist()
    return frames, height * width


def _rectangles(
    frames: int, tokens: int, ref_frames: int, ref_tokens: int, all_frames: int, all_tokens: int
) -> tuple[int, tuple[Rectangle, ...]]:
    """The attention pattern over keys in the order [zeros, video, reference].

    Args:
        frames: number of frames of the video.
        tokens: number of tokens per frame of the video.
        ref_frames: number of frames of the reference.
        ref_tokens: number of tokens per frame of the reference.
        all_frames: number of frames in diffusers' buffer for the reference; the video's has one more.
        all_tokens: number of tokens per frame in both buffers.

    Returns:
        The number of zeros, and rectangles of queries by the keys that they attend to.

    Raises:
        AttentionProviderError: the video or the reference does not fit into the buffers.
    """
    if frames > all_frames + 1 or ref_frames > all_frames or max(tokens, ref_tokens) > all_tokens:
        raise AttentionProviderError(
            f"a video of {frames} frames with {tokens} tokens and a reference of {ref_frames} frames with {ref_tokens} "
            f"tokens do not fit origin_len and origin_area, which allow {all_frames + 1} and {all_frames} frames with "
            f"{all_tokens} tokens. Give the length and area of the full video."
        )
    # The first frame has no reference. Every frame attends to the empty places in the video's buffer, and to those
    # beside its reference frame. All zeros are equal, so frames can share them.
    of_video = (all_frames + 1) * all_tokens - frames * tokens
    of_frame = [of_video] + [
        of_video + all_tokens - (ref_tokens if frame <= ref_frames else 0) for frame in range(1, frames)
    ]
    empty, video = max(of_frame), frames * tokens
    seen = [Rectangle((0, video), (empty, video))]
    for frame, zeros in enumerate(of_frame):
        queries = frame * tokens, tokens
        seen.append(Rectangle(queries, (0, zeros)))
        if 0 < frame <= ref_frames:
            seen.append(Rectangle(queries, (empty + video + (frame - 1) * ref_tokens, ref_tokens)))
    return empty, tuple(each for each in seen if each.key[1] > 0)
