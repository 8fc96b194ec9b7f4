"""torch.nn.attention.flex_attention: any mask, and the only kernel that takes a BlockMask.

On a GPU it is a kernel only if it is compiled (uncompiled it computes every score in memory). So an eager call uses one
compiled copy per process. On a CPU only the uncompiled form returns the lse.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ..masks import MaskKind
from ..shapes import Layout
from .base import Adapter, Params

RECOMPILE_LIMIT = 256


class Flex(Adapter):
    """Programmable attention (arXiv 2412.05496). The kernel gives zeros and an lse of -inf in fully masked rows."""

    layout: ClassVar[Layout] = "bhsd"

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        return _call(query, key, value, mask, params, return_lse=False)

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        out, lse = _call(query, key, value, mask, params, return_lse=True)
        return out, lse.transpose(1, 2)


def _call(query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params, return_lse: bool) -> Any:
    block = params.mask_kind == MaskKind.BLOCK
    arguments: dict[str, Any] = {
        "score_mod": score_mod(None if block else mask, params.is_causal),
        "block_mask": mask if block else None,
        "scale": params.scale,
        "enable_gqa": params.gqa,
        "return_lse": return_lse,
    }
    if not torch.is_grad_enabled():
        # The CPU form refuses inputs that require a gradient, even under no_grad.
        query, key, value = query.detach(), key.detach(), value.detach()
    if torch.compiler.is_compiling():
        return flex_attention(query, key, value, **arguments)
    if query.device.type == "cpu":
        with warnings.catch_warnings():  # it recommends torch.compile, which on a CPU cannot return the lse
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            return flex_attention(query, key, value, **arguments)
    # Every form of mask needs its own graph, and so do training and inference. Beyond the compiler's limit for one
    # function it would silently use the uncompiled form.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(query, key, value, **arguments)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def score_mod(mask: Tensor | None, is_causal: bool) -> Callable[..., Tensor] | None:
    """The function that flex_attention applies to each score, for a 4-D mask and for causality; None without both.

    Dimensions of size one are indexed with zero, so that a key mask `[B, 1, 1, Lk]` is not expanded.
    """
    if mask is None:
        return _causal if is_causal else None
    wide = [size > 1 for size in mask.shape]
    additive = mask.dtype != torch.bool

    def apply(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = (batch, head, query, key)
        entry = mask[tuple(index if real else 0 for index, real in zip(place, wide))]
        score = score + entry if additive else torch.where(entry, score, -math.inf)
        return torch.where(query >= key, score, -math.inf) if is_causal else score

    return apply


def _causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.where(query >= key, score, -math.inf)
