"""Mochi: one attention call for all samples of a batch, with their padding as a key mask.

diffusers' processor selects the valid text tokens of each sample and calls attention once per sample. This synchronises
with the device in every layer, breaks a compiled graph, and over several ranks gives each rank another number of keys.
Here valid tokens are moved to the front, as in diffusers, and the others are masked. The output for masked queries is
zero, as in diffusers. With a provider without key masks, diffusers' own code runs sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..context_parallel.sequences.active import active
from ..masks import MaskKind
from ..providers.catalog import SPECS
from ..scope import ProviderChoice, active_choice
from .overlay import Overlay

PROCESSOR = "diffusers.models.attention_processor.MochiAttnProcessor2_0"


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """The methods of a bound processor that replace `upstream`, the `__call__` of diffusers' processor."""
    return {"__call__": overlay.rebuild(cast(FunctionType, _call)), "sample_by_sample": overlay.rebuild(upstream)}


def _call(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over [video, valid text].

    Args:
        attn: a `MochiAttention`.
        hidden_states: the video's, `[batch, tokens, channels]`.
        encoder_hidden_states: the text's, `[batch, words, channels]`.
        attention_mask: `[batch, words]`, nonzero for valid words.
        image_rotary_emb: cosines and sines of the video, `[tokens, heads, head_dim / 2]`.

    Returns:
        Outputs of the video and the text.
    """
    if active.tracker is None and not _takes_key_masks(active_choice(self.choice)):
        return self.sample_by_sample(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    valid = attention_mask.bool()
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    valid = valid.gather(1, order)
    words = encoder_hidden_states.gather(1, order[..., None].expand_as(encoder_hidden_states))

    heads = (attn.heads, -1)
    video = [project(hidden_states).unflatten(2, heads) for project in (attn.to_q, attn.to_k, attn.to_v)]
    text = [project(words).unflatten(2, heads) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    video[:2] = _normed(attn.norm_q, video[0]), _normed(attn.norm_k, video[1])
    text[:2] = _normed(attn.norm_added_q, text[0]), _normed(attn.norm_added_k, text[1])
    if image_rotary_emb is not None:
        video[:2] = _rotated(video[0], *image_rotary_emb), _rotated(video[1], *image_rotary_emb)

    query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, text))
    seen = torch.cat([valid.new_ones(hidden_states.shape[:2]), valid], dim=1)
    out = dispatch_attention_fn(query, key, value, attn_mask=seen[:, None, None, :]).flatten(2)
    of_video, of_text = out.split_with_sizes([hidden_states.shape[1], words.shape[1]], dim=1)
    of_text = of_text.masked_fill(~valid[..., None], 0.0)
    of_video = attn.to_out[1](attn.to_out[0](of_video))
    return of_video, attn.to_add_out(of_text) if hasattr(attn, "to_add_out") else of_text


def _normed(norm: Any, tensor: Tensor) -> Tensor:
    return tensor if norm is None else norm(tensor)


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates every pair of neighbouring channels of a tensor `[batch, tokens, heads, head_dim]`."""
    even, odd = tensor.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(tensor.dtype)


def _takes_key_masks(choice: ProviderChoice) -> bool:
    return choice.provider == "auto" or MaskKind.KEY in SPECS[choice.provider].capabilities.masks
