"""Attention by its definition, in float64: what everything is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Lq, D]` and lse `[B, H, Lq]` of `[B, H, L, D]` inputs; zeros and -inf where no key is left."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~lower, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    dead = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)
    return weights @ value, scores.logsumexp(dim=-1)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result - reference‖ / ‖reference‖, in float64; of a zero reference, ‖result‖."""
    reference = reference.double()
    norm = reference.norm().item()
    return (result.double() - reference).norm().item() / (norm or 1.0)
