"""The calls with which every provider is tested on a GPU, and their tolerances."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.registry import provider_status

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# What is compiled anew for each kind of call takes seconds each time: these get the cases marked `few`.
SLOW_TO_COMPILE = {"flex", "flash_4"}
# flash-attn can be built without some of its head dims and options, to save hours of compiling. Such a build does not
# say so: it gives wrong numbers. What the one under test lacks is given here, as in "96,256,softcap,window".
BUILT_WITHOUT = set(filter(None, os.environ.get("DIFFUSERS_ATTN_FLASH_LACKS", "").split(",")))
BUILT_BY_FLASH_ATTN = {"flash", "flash_varlen", "xformers"}
FLASH_ATTN_HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def build_lacks(provider: str, head_dim: int) -> bool:
    kernel = next((str(size) for size in FLASH_ATTN_HEAD_DIMS if head_dim <= size), "")
    return provider in BUILT_BY_FLASH_ATTN and kernel in BUILT_WITHOUT


OUT_TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 2e-3}
GRAD_TOLERANCE = {BF16: 1.5e-2, FP16: 4e-3, FP32: 2e-3}
LOSSY_TOLERANCE = {
    "_sage_qk_int8_pv_fp16_cuda": 3e-2,
    "_sage_qk_int8_pv_fp16_triton": 3e-2,
    "sage_varlen": 3e-2,
    "sage_3": 3e-1,  # four bits
}
LOSSY_DEFAULT = 8e-2
"""of the variants with fp8 values."""
LSE_TOLERANCE, LOSSY_LSE_TOLERANCE = 5e-3, 1e-1


KINDS = {
    "none": MaskKind.NONE,
    "padding": MaskKind.KEY,
    "holes": MaskKind.KEY,
    "a sequence without keys": MaskKind.KEY,
    "outer": MaskKind.DENSE,
    "blocks": MaskKind.DENSE,
    "heads": MaskKind.DENSE,
    "key bias": MaskKind.KEY_BIAS,
    "bias": MaskKind.BIAS,
    "bias with -inf": MaskKind.BIAS,
}
"""of `Case.mask`: known without a GPU, where tests are only collected."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype = BF16
    head_dim: int = 64
    value_head_dim: int = 0
    query_len: int = 333
    key_len: int = 333
    heads: int = 4
    kv_heads: int = 4
    mask: str = "none"
    causal: bool = False
    layout: str = "bhsd"
    few: bool = False
    """whether the slow ones run it too."""

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def inputs(self, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value as `[2, heads, len, head_dim]` on the GPU, laid out in memory as `layout` says.

        Keys have a mean, as those of trained models do: it is what a wrongly corrected lse would show.
        """
        value_dim = self.value_head_dim or self.head_dim
        query = self._make(self.heads, self.query_len, self.head_dim)
        key = self._make(self.kv_heads, self.key_len, self.head_dim) + 0.5
        value = self._make(self.kv_heads, self.key_len, value_dim)
        if self.layout == "packed":  # one projection for all three, as fused models have
            packed = torch.stack([query, key, value], dim=2).transpose(1, 3).contiguous()
            query, key, value = (packed[:, :, each].transpose(1, 2) for each in range(3))
        return tuple(tensor.detach().requires_grad_(grad) for tensor in (query, key, value))  # type: ignore[return-value]

    def _make(self, heads: int, length: int, dim: int) -> Tensor:
        tensor = torch.randn(2, heads, length, dim, device="cuda", dtype=self.dtype)
        if self.layout == "bshd":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "columns":  # head_dim is not the contiguous one
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        return tensor

    def make_mask(self) -> Tensor | None:
        lq, lk, heads = self.query_len, self.key_len, self.heads
        keys, queries = torch.arange(lk, device="cuda"), torch.arange(lq, device="cuda").view(lq, 1)
        share = torch.tensor([0.6, 1.0], device="cuda").view(2, 1, 1, 1)
        half = torch.tensor([0.0, 1.0], device="cuda").view(2, 1, 1, 1)
        made: dict[str, Tensor | None] = {
            "none": None,
            "padding": keys < share * lk,
            "holes": ((keys % 7 != 3) & (keys < share * lk)),
            "a sequence without keys": keys < half * lk,
            "outer": (queries < lq - 60) & (keys < share * lk),
            "blocks": (queries // 50 == keys // 50).view(1, 1, lq, lk),
            "heads": torch.rand(1, heads, lq, lk, device="cuda") < 0.5,
            "key bias": torch.randn(2, 1, 1, lk, device="cuda", dtype=self.dtype),
            "bias": torch.randn(1, heads, lq, lk, device="cuda", dtype=self.dtype),
            "bias with -inf": torch.randn(lq, lk, device="cuda", dtype=self.dtype).masked_fill(
                (keys > 100) | (queries > lq - 20), -torch.inf
            ),
        }
        return made[self.mask]

    @property
    def mask_kind(self) -> MaskKind:
        return KINDS[self.mask]


CASES = [
    Case("bf16", head_dim=128, few=True),
    Case("fp16", FP16, few=True),
    Case("fp32", FP32),
    Case("bshd", layout="bshd", few=True),
    Case("packed qkv", layout="packed"),
    Case("columns", layout="columns"),
    Case("long", head_dim=128, query_len=1536, key_len=2048, few=True),
    Case("cross", query_len=257, key_len=77, few=True),
    Case("one query", query_len=1, key_len=131),
    Case("one key", query_len=70, key_len=1),
    Case("causal", query_len=201, key_len=201, causal=True, few=True),
    Case("causal shorter", query_len=100, key_len=181, causal=True, few=True),
    Case("causal longer", query_len=181, key_len=100, causal=True),
    Case("gqa", heads=8, kv_heads=2, few=True),
    Case("gqa causal", heads=6, kv_heads=3, head_dim=128, causal=True),
    Case("head_dim 40", head_dim=40, few=True),
    Case("head_dim 72", head_dim=72),
    Case("head_dim 76", head_dim=76),
    Case("head_dim 96", head_dim=96),
    Case("head_dim 160", head_dim=160),
    Case("head_dim 256", head_dim=256),
    Case("value head_dim", value_head_dim=96),
    Case("padding", mask="padding", few=True),
    Case("padding fp16", FP16, mask="padding", head_dim=128),
    Case("padding fp32", FP32, mask="padding"),
    Case("holes", mask="holes", query_len=130),
    Case("padding gqa", mask="padding", heads=8, kv_heads=2),
    Case("padding bshd", mask="padding", layout="bshd"),
    Case("padding causal", mask="padding", causal=True),
    Case("a sequence without keys", mask="a sequence without keys", few=True),
    Case("outer", mask="outer", few=True),
    Case("outer cross", mask="outer", query_len=150, key_len=77, head_dim=128),
    Case("blocks", mask="blocks", few=True),
    Case("heads", mask="heads"),
    Case("heads gqa", mask="heads", heads=8, kv_heads=2),
    Case("key bias", mask="key bias", few=True),
    Case("bias", mask="bias", key_len=250),
    Case("bias fp32", FP32, mask="bias"),
    Case("bias causal", mask="bias", causal=True, query_len=200, key_len=200),
    Case("bias with -inf", mask="bias with -inf"),
]
NAMED = {case.name: case for case in CASES}


def serves(provider: str, case: Case) -> bool:
    """What the catalog says."""
    can = SPECS[provider].capabilities
    kind = case.mask_kind
    if case.causal and kind != MaskKind.NONE:
        kind = MaskKind.DENSE if kind in (MaskKind.KEY, MaskKind.DENSE) else MaskKind.BIAS
    largest = max(case.head_dim, case.value_head_dim)
    return (
        case.dtype in can.dtypes
        and kind in can.masks
        and (not case.causal or can.causal != "none")
        and (can.max_head_dim is None or largest <= can.max_head_dim)
        and (case.value_head_dim in (0, case.head_dim) or can.value_head_dim)
        and not build_lacks(provider, largest)
        and (provider not in SLOW_TO_COMPILE or case.few)
    )


def exact_tolerance(provider: str, dtype: torch.dtype) -> float:
    """What an output may be off by, relative to its norm."""
    if SPECS[provider].capabilities.exact:
        return OUT_TOLERANCE[dtype]
    return LOSSY_TOLERANCE.get(provider, LOSSY_DEFAULT)


def providers(condition=lambda capabilities: True):
    """A parameter for every provider that runs on CUDA; the unusable ones skip with their reason."""
    for name, spec in SPECS.items():
        if "cuda" in spec.capabilities.devices and condition(spec.capabilities):
            yield pytest.param(name, marks=_skip_unusable(name))


def provider_cases(condition=lambda capabilities: True, cases=None):
    """`(provider, case)` for whatever the catalog says is served."""
    for param in providers(condition):
        (name,) = param.values
        for case in cases or CASES:
            if serves(name, case):
                yield pytest.param(name, case, marks=param.marks, id=f"{name}-{case}")
            if param.marks:
                break  # one line for an unusable provider is enough


def _skip_unusable(name: str):
    if not torch.cuda.is_available():
        return [pytest.mark.skip(reason="PyTorch sees no CUDA device")]
    status = provider_status(name)
    return [] if status.available else [pytest.mark.skip(reason=f"{name}: {status.reason}")]
