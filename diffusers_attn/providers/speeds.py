"""Measured speeds of the providers, by which `auto` chooses.

The figures are forward TFLOP/s (4 * batch * heads * Lq * Lk * head_dim over the time of one call) in bfloat16 without a
mask, measured by `benchmarks/providers.py`; docs/providers.md lists the runs. `auto` needs only their order; the cost
model of context parallelism (`parallelize/cost.py`) needs the figures. Speeds measured on this machine, in a file that
the environment names, take precedence (`speeds_file.py`).
"""

from __future__ import annotations

from . import speeds_file

LONG = 8192
"""Key length from which the second figure of a provider applies."""

# (compute capability, largest head_dim) -> provider -> (at 4,608 tokens, at 17,776 and more).
# With head_dim 64 only long sequences were measured; short ones are assumed to rank alike.
MEASURED: speeds_file.Tables = {
    ((9, 0), 64): {
        "flash_4": (526, 526),
        "sage": (499, 499),
        "_sage_qk_int8_pv_fp8_cuda_sm90": (496, 496),
        "_sage_qk_int8_pv_fp16_triton": (414, 414),
        "_native_cudnn": (403, 403),
        "sage_varlen": (400, 400),
        "_sage_qk_int8_pv_fp16_cuda": (358, 358),
        "_sage_qk_int8_pv_fp8_cuda": (326, 326),
        "flash": (317, 317),
        "xformers": (310, 310),
        "_native_flash": (309, 309),
        "flash_varlen": (308, 308),
        "flex": (295, 295),
        "_native_efficient": (136, 136),
    },
    ((9, 0), 128): {
        "_native_cudnn": (555, 557),
        "flash_4": (531, 672),
        "sage": (415, 767),
        "_sage_qk_int8_pv_fp8_cuda_sm90": (330, 769),
        "flash": (329, 375),
        "_native_flash": (314, 343),
        "flash_varlen": (303, 372),
        "flex": (292, 375),
        "xformers": (275, 372),
        "_sage_qk_int8_pv_fp16_triton": (260, 438),
        "_sage_qk_int8_pv_fp16_cuda": (243, 431),
        "_sage_qk_int8_pv_fp8_cuda": (209, 357),
        "sage_varlen": (206, 398),
        "_native_efficient": (161, 177),
    },
}

UNMEASURED = ("flash_3", "flash", "_native_cudnn", "native", "xformers", "flex", "flash_varlen", "_native_math")
"""The order without measurements, newest kernels first; also the order after the measured providers."""


def measured(capability: tuple[int, int] | None, head_dim: int) -> tuple[int, speeds_file.Table]:
    """The measured speeds on a GPU, by provider: at short and at long sequences (`LONG`), in TFLOP/s.

    Args:
        capability: compute capability of the GPU; None on other devices.

    Returns:
        The head_dim that was measured, the smallest that is not below the given one, with the speeds. 0 and an empty
        dict if nothing was measured.

    Raises:
        AttentionProviderError: the environment names a file of speeds that cannot be used.
    """
    own = speeds_file.tables()
    sizes = [size for chip, size in {**MEASURED, **own} if chip == capability and head_dim <= size]
    if capability is None or not sizes:
        return 0, {}
    key = capability, min(sizes)
    return min(sizes), {**MEASURED.get(key, {}), **own.get(key, {})}
