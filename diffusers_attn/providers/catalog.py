"""The table of providers: capabilities, required packages and options."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import torch

from ..masks import MaskKind
from .base import Capabilities, HubKernel, Option, ProviderSpec, Requirement
from .hub import SOURCE


class AttentionProvider(str, enum.Enum):
    """The attention providers, named as in finetrainers where it has them. Members equal their strings."""

    AUTO = "auto"
    NATIVE = "native"
    FLASH = "flash"
    FLASH_VARLEN = "flash_varlen"
    FLASH_3 = "flash_3"
    FLASH_3_FP8 = "flash_3_fp8"
    FLASH_4 = "flash_4"
    FLEX = "flex"
    SAGE = "sage"
    SAGE_VARLEN = "sage_varlen"
    SAGE_3 = "sage_3"
    XFORMERS = "xformers"
    _NATIVE_CUDNN = "_native_cudnn"
    _NATIVE_EFFICIENT = "_native_efficient"
    _NATIVE_FLASH = "_native_flash"
    _NATIVE_MATH = "_native_math"
    _SAGE_QK_INT8_PV_FP8_CUDA = "_sage_qk_int8_pv_fp8_cuda"
    _SAGE_QK_INT8_PV_FP8_CUDA_SM90 = "_sage_qk_int8_pv_fp8_cuda_sm90"
    _SAGE_QK_INT8_PV_FP16_CUDA = "_sage_qk_int8_pv_fp16_cuda"
    _SAGE_QK_INT8_PV_FP16_TRITON = "_sage_qk_int8_pv_fp16_triton"

    def __str__(self) -> str:
        return self.value


DIFFUSERS_BACKENDS = {
    "_flash_3": "flash_3",
    "_flash_varlen_3": "flash_3",
    "flash_hub": "flash",
    "flash_varlen_hub": "flash_varlen",
    "flash_4_hub": "flash_4",
    "_flash_3_hub": "flash_3",
    "_flash_3_varlen_hub": "flash_3",
    "sage_hub": "sage",
    "sage_blackwell_hub": "sage_3",
}
"""Attention backends of diffusers, and the providers with the same kernels, where the names differ."""

CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
CPU_AND_CUDA = CPU | CUDA
HALF = frozenset({torch.float16, torch.bfloat16})
HALF_AND_FLOAT = HALF | {torch.float32}
FLOATS = HALF_AND_FLOAT | {torch.float64}

NO_MASK = frozenset({MaskKind.NONE})
KEY_MASK = NO_MASK | {MaskKind.KEY}
TENSOR_MASKS = KEY_MASK | {MaskKind.KEY_BIAS, MaskKind.DENSE, MaskKind.BIAS}
ALL_MASKS = TENSOR_MASKS | {MaskKind.BLOCK}

FLASH_ATTN = Requirement(
    "flash-attn", "2.6.3", "flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation"
)
FLASH_ATTN_3 = Requirement(
    "flash-attn-3",
    "3.0.0b1",
    "flash_attn_interface",
    "pip install ./hopper --no-build-isolation   # in a clone of https://github.com/Dao-AILab/flash-attention",
)
FLASH_ATTN_4 = Requirement("flash-attn-4", "4.0.0b36", "flash_attn.cute", "pip install --pre flash-attn-4")
SAGE_ATTENTION = Requirement(
    "sageattention",
    "2.1.1",
    "sageattention.core",
    "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation",
)
SAGE_ATTENTION_MASKS = dataclasses.replace(SAGE_ATTENTION, minimum="2.2.0")
SAGE_ATTENTION_3 = Requirement(
    "sageattn3",
    "1.0.0",
    "sageattn3",
    "pip install ./sageattention3_blackwell --no-build-isolation"
    "   # in a clone of https://github.com/thu-ml/SageAttention",
)
XFORMERS_PACKAGE = Requirement("xformers", "0.0.29.post3", "xformers", "pip install -U xformers")

# The repositories and versions that diffusers 0.42.1 takes, too.
FLASH_ATTN_HUB = HubKernel("kernels-community/flash-attn2", 3, "flash_attn_interface")
FLASH_ATTN_3_HUB = HubKernel("kernels-community/flash-attn3", 1, "flash_attn_interface")
SAGE_ATTENTION_HUB = HubKernel("SageAttention/sage-attention", 3)
SAGE_ATTENTION_3_HUB = HubKernel("SageAttention/sage-blackwell", 1)

WINDOW = Option(
    tuple, "(left, right) keys that a query sees around its own position; -1 is unlimited", by_place=True, off=(-1, -1)
)
SOFTCAP = Option((float, int), "caps scores at softcap * tanh(score / softcap); 0 is off", off=0)
DETERMINISTIC = Option(bool, "a backward that gives the same bits every time, more slowly")
SMOOTH_K = Option(bool, "subtract the mean of the keys before quantising; more accurate")
QUANT_GRANULARITY = Option(str, "granularity of the int8 scales", ("per_warp", "per_thread"))


def _accumulator(*choices: str) -> Option:
    return Option(str, "type in which weights times values are summed, and of the buffer behind it", choices)


_FLASH_2 = Capabilities(
    devices=CUDA,
    dtypes=HALF,
    masks=KEY_MASK,
    max_head_dim=256,
    head_dim_multiple=8,
    causal="square",
    gqa=True,
    min_compute_capability=(8, 0),
)
_SAGE = Capabilities(
    devices=CUDA,
    dtypes=HALF,
    max_head_dim=128,
    head_dim_multiple=64,
    causal="square",
    gqa=True,
    backward=False,
    cuda_graph=False,
    exact=False,
    min_compute_capability=(8, 0),
)
_NO_SAGE_TRITON = "of SageAttention, only the CUDA kernels are taken from the Hub"
_FLASH_OPTIONS = {"deterministic": DETERMINISTIC, "softcap": SOFTCAP, "window_size": WINDOW}
_FROM_HUB = {"source": SOURCE}
_FLASH_2_OPTIONS = _FLASH_OPTIONS | _FROM_HUB


def _with(capabilities: Capabilities, **changes: object) -> Capabilities:
    return dataclasses.replace(capabilities, **changes)  # type: ignore[arg-type]


_SPECS = (
    ProviderSpec(
        "native",
        "native:Native",
        Capabilities(
            devices=CPU_AND_CUDA | {"mps", "xpu", "npu"},
            dtypes=FLOATS,
            masks=TENSOR_MASKS,
            value_head_dim=True,
            causal="top_left",
            gqa=True,
            dropout=True,
            bias_gradient=True,
            every_derivative=True,
        ),
        "F.scaled_dot_product_attention: PyTorch's own choice among its kernels",
    ),
    ProviderSpec(
        "_native_cudnn",
        "aten_cudnn:Cudnn",
        Capabilities(
            devices=CUDA,
            dtypes=HALF,
            masks=TENSOR_MASKS,
            max_head_dim=128,
            head_dim_multiple=8,
            causal="top_left",
            gqa=True,
            min_compute_capability=(8, 0),
        ),
        "cuDNN's fused kernel, shipped with PyTorch; the fastest native one on Hopper",
    ),
    ProviderSpec(
        "_native_flash",
        "aten_kernels:Flash",
        Capabilities(
            devices=CUDA,
            dtypes=HALF,
            max_head_dim=256,
            head_dim_multiple=8,
            causal="square",
            gqa=True,
            min_compute_capability=(8, 0),
        ),
        "the FlashAttention-2 that PyTorch ships",
    ),
    ProviderSpec(
        "_native_efficient",
        "aten_kernels:Efficient",
        Capabilities(
            devices=CUDA,
            dtypes=HALF_AND_FLOAT,
            masks=TENSOR_MASKS,
            head_dim_multiple=8,
            value_head_dim=True,
            causal="top_left",
            min_compute_capability=(5, 0),
        ),
        "the memory-efficient kernel that PyTorch ships; float32, and any tensor mask",
    ),
    ProviderSpec(
        "_native_math",
        "aten_kernels:Math",
        Capabilities(
            devices=CPU_AND_CUDA | {"mps", "xpu", "npu"},
            dtypes=FLOATS,
            masks=TENSOR_MASKS,
            value_head_dim=True,
            causal="top_left",
            dropout=True,
            bias_gradient=True,
            every_derivative=True,
        ),
        "matmul, softmax, matmul: the reference, quadratic in memory",
    ),
    ProviderSpec(
        "flash",
        "flash:Flash2",
        _FLASH_2,
        "FlashAttention-2; key masks through its variable-length kernel",
        FLASH_ATTN,
        _FLASH_2_OPTIONS,
        FLASH_ATTN_HUB,
    ),
    ProviderSpec(
        "flash_varlen",
        "flash:Flash2Varlen",
        _FLASH_2,
        "FlashAttention-2's variable-length kernel, for every call",
        FLASH_ATTN,
        _FLASH_2_OPTIONS,
        FLASH_ATTN_HUB,
    ),
    ProviderSpec(
        "flash_3",
        "flash3:Flash3",
        _with(_FLASH_2, compute_capabilities=frozenset({(9, 0)})),
        "FlashAttention-3, for Hopper",
        FLASH_ATTN_3,
        _FLASH_2_OPTIONS,
        FLASH_ATTN_3_HUB,
    ),
    ProviderSpec(
        "flash_3_fp8",
        "flash3_fp8:Flash3Fp8",
        _with(
            _FLASH_2,
            head_dim_multiple=16,
            backward=False,
            exact=False,
            compute_capabilities=frozenset({(9, 0)}),
        ),
        "FlashAttention-3 with query, key and value in float8; lossy",
        FLASH_ATTN_3,
        {"softcap": SOFTCAP, "window_size": WINDOW} | _FROM_HUB,
        FLASH_ATTN_3_HUB,
    ),
    ProviderSpec(
        "flash_4",
        "flash4:Flash4",
        # On Hopper the kernel takes head dims up to 256. On consumer Blackwell (12.x) its backward supports no mask.
        _with(
            _FLASH_2,
            masks=KEY_MASK | {MaskKind.DENSE},
            max_head_dim=128,
            head_dim_multiple=32,  # with 40 its backward gives wrong query gradients
            min_compute_capability=None,
            compute_capabilities=frozenset({(9, 0), (10, 0), (10, 3), (11, 0)}),
        ),
        "FlashAttention-4: written in CuTe DSL, compiled on first use; bool masks of any form",
        FLASH_ATTN_4,
        _FLASH_OPTIONS,
        without_hub="the kernel on the Hub is older (4.0.0b8) than the oldest that gives right results (4.0.0b36), and "
        "the package needs no compiler",
    ),
    ProviderSpec(
        "flex",
        "flex:Flex",
        Capabilities(
            devices=CPU_AND_CUDA,
            dtypes=HALF_AND_FLOAT,
            masks=ALL_MASKS,
            causal="top_left",
            gqa=True,
            without_backward_on=CPU,
            backward_of_parts=False,
        ),
        "torch.nn.attention.flex_attention; the one that takes a BlockMask",
    ),
    ProviderSpec(
        "sage",
        "sage:Sage",
        _with(_SAGE, compute_capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)})),
        "SageAttention's own choice of int8/fp8 kernel for this GPU; lossy",
        SAGE_ATTENTION,
        _FROM_HUB,
        SAGE_ATTENTION_HUB,
    ),
    ProviderSpec(
        "sage_varlen",
        "sage:SageVarlen",
        _with(_SAGE, masks=KEY_MASK, lse=False),
        "SageAttention's variable-length int8 kernel, for key masks; lossy",
        SAGE_ATTENTION,
        {"smooth_k": SMOOTH_K},
        without_hub=_NO_SAGE_TRITON,
    ),
    ProviderSpec(
        "_sage_qk_int8_pv_fp8_cuda",
        "sage:Fp8Cuda",
        _with(_SAGE, min_compute_capability=(8, 9)),
        "SageAttention, fp8 values, Ada kernel; lossy",
        SAGE_ATTENTION,
        {
            "smooth_k": SMOOTH_K,
            "qk_quant_gran": QUANT_GRANULARITY,
            "pv_accum_dtype": _accumulator("fp32", "fp32+fp32", "fp32+fp16"),
        }
        | _FROM_HUB,
        SAGE_ATTENTION_HUB,
    ),
    ProviderSpec(
        "_sage_qk_int8_pv_fp8_cuda_sm90",
        "sage:Fp8CudaSm90",
        _with(_SAGE, compute_capabilities=frozenset({(9, 0)})),
        "SageAttention, fp8 values, Hopper kernel; lossy",
        SAGE_ATTENTION,
        {"smooth_k": SMOOTH_K, "qk_quant_gran": QUANT_GRANULARITY} | _FROM_HUB,
        SAGE_ATTENTION_HUB,
    ),
    ProviderSpec(
        "_sage_qk_int8_pv_fp16_cuda",
        "sage:Fp16Cuda",
        _SAGE,
        "SageAttention, fp16 values, CUDA kernel; lossy",
        SAGE_ATTENTION,
        {
            "smooth_k": SMOOTH_K,
            "qk_quant_gran": QUANT_GRANULARITY,
            "pv_accum_dtype": _accumulator("fp32", "fp16", "fp16+fp32"),
        }
        | _FROM_HUB,
        SAGE_ATTENTION_HUB,
    ),
    ProviderSpec(
        "_sage_qk_int8_pv_fp16_triton",
        "sage:Fp16Triton",
        _with(_SAGE, masks=KEY_MASK | {MaskKind.DENSE}, cuda_graph=True),
        "SageAttention, fp16 values, Triton kernel; bool masks; lossy",
        SAGE_ATTENTION_MASKS,
        {"smooth_k": SMOOTH_K},
        without_hub=_NO_SAGE_TRITON,
    ),
    ProviderSpec(
        "sage_3",
        "sage3:Sage3",
        # The package also compiles for 10.0, where its kernel refuses to run.
        _with(
            _SAGE,
            gqa=False,
            lse=False,
            cuda_graph=True,
            min_compute_capability=None,
            compute_capabilities=frozenset({(12, 0), (12, 1)}),
        ),
        "SageAttention 3 (FP4), for consumer Blackwell; lossy",
        SAGE_ATTENTION_3,
        _FROM_HUB,
        SAGE_ATTENTION_3_HUB,
    ),
    ProviderSpec(
        "xformers",
        "xformers:Xformers",
        Capabilities(
            devices=CUDA,
            dtypes=HALF_AND_FLOAT,
            masks=TENSOR_MASKS,
            head_dim_multiple=8,
            value_head_dim=True,
            causal="top_left",
            min_compute_capability=(5, 0),
        ),
        "xformers' memory_efficient_attention",
        XFORMERS_PACKAGE,
    ),
)

SPECS: dict[str, ProviderSpec] = {spec.name: spec for spec in _SPECS}
"""The providers by name, without `auto`, which chooses between these."""


def options_by_place(provider: str, options: Iterable[tuple[str, object]]) -> tuple[str, ...]:
    """The options that depend on positions in the sequence and are on, as text: `window_size=(1, 1)`."""
    known = SPECS[provider].options if provider in SPECS else {}
    return tuple(
        f"{name}={value!r}"
        for name, value in options
        if name in known and known[name].by_place and value != known[name].off
    )
