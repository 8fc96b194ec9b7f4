"""The attention calls to measure: shapes of real models, and masks. Imports no PyTorch."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...errors import AttentionProviderError


class Shape(NamedTuple):
    """Sizes of query, key and value, which are equal."""

    batch: int
    heads: int
    length: int
    """Number of tokens."""
    head_dim: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.heads} heads, {self.length:,} tokens, head_dim {self.head_dim}"


class NamedShape(NamedTuple):
    """A named shape."""

    shape: Shape
    text: str


WORKLOADS = {
    "tiny": NamedShape(Shape(1, 4, 512, 64), "small enough for a CPU"),
    "flux-1024": NamedShape(Shape(1, 24, 4608, 128), "Flux, 1024 x 1024: 64 * 64 + 512 tokens of text"),
    "qwen-image": NamedShape(Shape(1, 24, 7145, 128), "Qwen-Image, 1328 x 1328: 83 * 83 + 256 tokens of text"),
    "cogvideox": NamedShape(Shape(2, 48, 17776, 64), "CogVideoX-5B with guidance, 49 frames of 480 x 720"),
    "ltx2": NamedShape(Shape(1, 32, 6144, 128), "LTX 2, video: 121 frames of 512 x 768"),
    "wan-480p": NamedShape(Shape(1, 12, 32760, 128), "Wan 2.1 1.3B, 81 frames of 480 x 832"),
    "wan-720p": NamedShape(Shape(1, 40, 75600, 128), "Wan 2.1 14B, 81 frames of 720 x 1280"),
    "hunyuan15-720p": NamedShape(Shape(1, 16, 111600, 128), "HunyuanVideo 1.5, 121 frames of 720 x 1280"),
}
"""By name, as on the command line."""

DTYPES = ("bfloat16", "float16", "float32", "float64")
MASKS = {
    "none": ("no mask", 1.0),
    "causal": ("is_causal", 0.5),
    "key": ("a bool mask of one value per key: the last quarter is padding", 0.75),
    "dense": ("a bool mask of one value per query and key: a random half", 1.0),
    "bias": ("random numbers added to the scores, one per query and key", 1.0),
}
"""By name: what the mask is, and the share of the pairs of query and key that TFLOP/s count."""


def shape_of(text: str) -> Shape:
    """The shape in a text such as "1,24,4608,128": batch, heads, length, head_dim.

    Raises:
        AttentionProviderError: it is not four positive numbers.
    """
    if not re.fullmatch(r"\s*[1-9]\d*\s*([,x]\s*[1-9]\d*\s*){3}", text):
        raise AttentionProviderError(
            f"--shape {text}: four positive numbers are accepted, batch,heads,length,head_dim, such as 1,24,4608,128."
        )
    return Shape(*map(int, re.split("[,x]", text)))


def workload_shape(name: str) -> Shape:
    """The shape of a named workload.

    Raises:
        AttentionProviderError: there is none of this name.
    """
    if name not in WORKLOADS:
        raise AttentionProviderError(
            f"there is no workload {name!r}. There are: {', '.join(WORKLOADS)}. For other sizes give --shape."
        )
    return WORKLOADS[name].shape


def tflop(shape: Shape, mask: str, *, backward: bool) -> float:
    """Floating-point operations of a call, in units of 1e12: 4 per pair of query and key and per head_dim in a forward,
    14 in a forward and its backward."""
    pairs = shape.batch * shape.heads * shape.length**2 * MASKS[mask][1]
    return (14 if backward else 4) * pairs * shape.head_dim / 1e12
