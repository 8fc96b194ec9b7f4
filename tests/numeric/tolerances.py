"""How far a cell may be from the definition, relative to the norm of what is compared.

Those of half precision are the GPU suite's. On a GPU, float32 kernels compute in TF32.
"""

from __future__ import annotations

import torch

from diffusers_attn.providers.catalog import SPECS

from ..gpu.cases import GRAD_TOLERANCE, LOSSY_DEFAULT, LOSSY_TOLERANCE, OUT_TOLERANCE

CPU_FLOAT32 = 2e-6
FLOAT64 = 1e-13


def output(provider: str, dtype: torch.dtype, device: str) -> float:
    """Of an output."""
    if provider in SPECS and not SPECS[provider].capabilities.exact:
        return LOSSY_TOLERANCE.get(provider, LOSSY_DEFAULT)
    return _wide(dtype, device) or OUT_TOLERANCE[dtype]


def gradient(dtype: torch.dtype, device: str) -> float:
    """Of each gradient."""
    return 10 * _wide(dtype, device) or GRAD_TOLERANCE[dtype]


def _wide(dtype: torch.dtype, device: str) -> float:
    if dtype == torch.float64:
        return FLOAT64
    return CPU_FLOAT32 if dtype == torch.float32 and device == "cpu" else 0.0
