"""What was measured, for `auto` to choose by: fastest first, per GPU and head dimension.

The figures are forward TFLOP/s (4 * batch * heads * Lq * Lk * head_dim over the time of one call), bfloat16, no mask,
from `benchmarks/providers.py`; docs/providers.md has the runs. Only the order matters here.
"""

from __future__ import annotations

# (compute capability, head_dim up to) -> provider -> TFLOP/s at lengths below 8192 and from 8192 on.
MEASURED: dict[tuple[tuple[int, int], int], dict[str, tuple[float, float]]] = {
    ((9, 0), 64): {
        "flash_4": (400, 531),
        "_native_cudnn": (390, 416),
        "sage": (380, 486),
        "_sage_qk_int8_pv_fp16_triton": (300, 420),
        "flash": (300, 318),
        "_native_flash": (280, 316),
        "_native_efficient": (120, 137),
    },
    ((9, 0), 128): {
        "_native_cudnn": (605, 570),
        "flash_4": (529, 660),
        "sage": (445, 758),
        "flash": (335, 379),
        "_sage_qk_int8_pv_fp16_triton": (307, 436),
        "_native_flash": (290, 360),
        "_native_efficient": (152, 178),
    },
}

LONG = 8192
"""the key length from which the second figure counts."""

UNMEASURED = ("flash_3", "flash", "_native_cudnn", "native", "xformers", "flex", "flash_varlen", "_native_math")
"""The order elsewhere: newest kernels first. Also what follows the measured ones."""
