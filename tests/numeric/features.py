"""What a call of attention may have, one feature at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_attn.masks import MaskKind

PASSES = ("forward", "backward", "compiled", "captured")
LENGTH = 150
"""Tokens, more than one tile of any kernel and a multiple of none."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask, and its kind as the capabilities name it."""

    kind: MaskKind
    make: Callable[[Feature, torch.device, torch.dtype], Tensor]
    """The values, broadcastable to `[batch, heads, query_len, key_len]`: also what a `BlockMask` is made from."""
    rows: bool = True
    """Whether queries have rows of their own."""
    needs_grad: bool = False


@dataclasses.dataclass(frozen=True)
class Feature:
    """A kind of call. Fields say how it differs from self-attention of two sequences with four heads of 64."""

    dtype: torch.dtype | None = None
    """None: what `statements.dtype_of` chooses."""
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    value_head_dim: int = 64
    query_len: int = LENGTH
    key_len: int = LENGTH
    mask: str = ""
    """Name in `MASKS`."""
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the provider."""
    form: str = "plain"
    """Name in `forms.FORMS`: what kind of tensors is given, and how they lie in memory."""

    @property
    def mask_kind(self) -> MaskKind:
        return MASKS[self.mask].kind if self.mask else MaskKind.NONE

    def arguments(self) -> dict[str, Any]:
        """Arguments of `attention_dispatch` beside tensors, those that are not its defaults."""
        given = {"dropout_p": self.dropout_p, "is_causal": self.is_causal, "scale": self.scale}
        return {name: value for name, value in given.items() if value} | (
            {"enable_gqa": True} if self.heads != self.kv_heads else {}
        )

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, `[batch, heads, length, head_dim]`. Keys have a mean, as those of trained models do.

        With dropout, the values are unit vectors: so the output is the weights, and shows which of them were dropped.
        """
        random = torch.Generator().manual_seed(len(self.form) + self.query_len + self.head_dim)

        def normal(heads: int, length: int, size: int) -> Tensor:
            return torch.randn(self.batch, heads, length, size, generator=random, dtype=torch.float64)

        query = normal(self.heads, self.query_len, self.head_dim)
        key = normal(self.kv_heads, self.key_len, self.head_dim) + 0.5
        value = normal(self.kv_heads, self.key_len, self.value_head_dim)
        if self.dropout_p:
            value = torch.eye(self.key_len, self.value_head_dim, dtype=torch.float64).expand_as(value)
        return query.to(device, dtype), key.to(device, dtype), value.contiguous().to(device, dtype)


def _places(feature: Feature, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(feature.query_len, device=device).view(-1, 1), torch.arange(feature.key_len, device=device)


def _padding(feature: Feature, device: torch.device, dtype: torch.dtype, share: float = 0.6) -> Tensor:
    """A shorter sequence, and a full one."""
    lengths = torch.tensor([int(share * feature.key_len), feature.key_len], device=device)
    return torch.arange(feature.key_len, device=device) < lengths.view(2, 1, 1, 1)


def _outer(feature: Feature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of one value per token, for as many queries as keys."""
    tokens = _padding(feature, device, dtype)
    return tokens.transpose(2, 3) & tokens


def _documents(feature: Feature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Queries see the keys of their own document. A third of the queries is in none."""
    queries, keys = _places(feature, device)
    return ((queries // 50 == keys // 50) & (queries < 100))[None, None]


def _random(shape: str, additive: bool, feature: Feature, device: torch.device, dtype: torch.dtype) -> Tensor:
    full = {"b": feature.batch, "h": feature.heads, "q": feature.query_len, "k": feature.key_len, "1": 1}
    random = torch.Generator().manual_seed(3)
    values = torch.randn([full[each] for each in shape], generator=random, dtype=torch.float64)
    return values.to(device, dtype) if additive else (values > 0).to(device)


def _endless(feature: Feature, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive, with minus infinity, for some queries everywhere."""
    queries, keys = _places(feature, device)
    return _random("11qk", True, feature, device, dtype).masked_fill((keys > 100) | (queries > 130), -math.inf)


MASKS = {
    "padding": Mask(MaskKind.KEY, _padding, rows=False),
    "no key": Mask(MaskKind.KEY, functools.partial(_padding, share=0.0), rows=False),
    "rows": Mask(MaskKind.DENSE, functools.partial(_random, "11qk", False)),
    "rows of heads": Mask(MaskKind.DENSE, functools.partial(_random, "bhqk", False)),
    "documents": Mask(MaskKind.DENSE, _documents),
    "outer": Mask(MaskKind.DENSE, _outer),
    "key bias": Mask(MaskKind.KEY_BIAS, functools.partial(_random, "b11k", True), rows=False),
    "bias": Mask(MaskKind.BIAS, functools.partial(_random, "1hqk", True)),
    "endless": Mask(MaskKind.BIAS, _endless),
    "trained bias": Mask(MaskKind.BIAS, functools.partial(_random, "1hqk", True), needs_grad=True),
    "block": Mask(MaskKind.BLOCK, _documents),
}
"""Masks by name."""

FEATURES = {
    "no mask": Feature(),
    "key mask": Feature(mask="padding"),
    "key mask, a sequence without keys": Feature(mask="no key"),
    "rows": Feature(mask="rows"),
    "rows of every head": Feature(mask="rows of heads"),
    "rows, some without keys": Feature(mask="documents"),
    "outer product": Feature(mask="outer"),
    "additive, of keys": Feature(mask="key bias"),
    "additive, dense": Feature(mask="bias"),
    "additive, with minus infinity": Feature(mask="endless"),
    "additive, with its gradient": Feature(mask="trained bias"),
    "BlockMask": Feature(mask="block"),
    "causal": Feature(is_causal=True),
    "causal, fewer queries": Feature(is_causal=True, query_len=90),
    "causal, more queries": Feature(is_causal=True, key_len=90),
    "causal and key mask": Feature(is_causal=True, mask="padding"),
    "causal and additive": Feature(is_causal=True, mask="bias"),
    "GQA": Feature(heads=8, kv_heads=2),
    "GQA, one key head": Feature(kv_heads=1),
    "GQA, causal, key mask": Feature(heads=8, kv_heads=2, is_causal=True, mask="padding"),
    "fewer queries": Feature(query_len=77),
    "more queries": Feature(key_len=77),
    "scale": Feature(scale=0.3),
    "dropout": Feature(dropout_p=0.4, key_len=64),
    "window": Feature(options=(("window_size", (40, 20)),)),
    "softcap": Feature(options=(("softcap", 2.0),)),
    **{f"head_dim {size}": Feature(head_dim=size, value_head_dim=size) for size in (32, 40, 72, 76, 96, 128, 160)},
    **{f"head_dim {size}": Feature(head_dim=size, value_head_dim=size) for size in (192, 256)},
    "values of 32": Feature(value_head_dim=32),
    "values of 96": Feature(value_head_dim=96),
    "float64": Feature(torch.float64),
    "float32": Feature(torch.float32),
    "float16": Feature(torch.float16),
    "bfloat16": Feature(torch.bfloat16),
    "float16, key mask": Feature(torch.float16, mask="padding"),
    "tokens before heads": Feature(form="bshd"),
    "packed projection": Feature(form="packed"),
    "every second token": Feature(form="gaps"),
    "head_dim not innermost": Feature(form="columns"),
    "three dimensions": Feature(form="three dimensions", batch=1),
    "five dimensions": Feature(form="five dimensions"),
    "one sequence": Feature(batch=1),
    "three sequences": Feature(batch=3),
    "one query": Feature(query_len=1),
    "one key": Feature(key_len=1),
    "one token": Feature(query_len=1, key_len=1),
    "no query": Feature(query_len=0),
    "no key": Feature(key_len=0),
    "no sequence": Feature(batch=0),
    "`nn.Parameter`": Feature(form="parameter"),
    "subclass without code": Feature(form="labelled"),
    "CausalBias, upper left": Feature(form="upper left", query_len=90),
    "CausalBias, lower right": Feature(form="lower right", query_len=90),
    "nested, strided": Feature(form="nested strided"),
    "nested, jagged": Feature(form="nested jagged"),
    "DTensor": Feature(form="DTensor"),
    "quantised": Feature(form="quantised", dtype=torch.float32),
    "sparse": Feature(form="sparse"),
    "MaskedTensor": Feature(form="masked", dtype=torch.float32),
    "fake": Feature(form="fake"),
    "meta": Feature(form="meta"),
    "`torch.vmap`": Feature(form="vmap"),
    "`torch.func.grad`": Feature(form="func.grad"),
    "forward mode": Feature(form="jvp"),
}
"""Features by name, as docs/trust.md has them."""
