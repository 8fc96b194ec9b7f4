"""Measures providers at one shape: whether they serve the call, their error, and their time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import attention_dispatch, attention_provider
from ...errors import AttentionProviderError
from ...providers.catalog import SPECS
from .reference import Reference, reference
from .timing import Call, milliseconds, synchronize
from .workloads import Shape, tflop

LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""The relative error above which an exact provider counts as wrong, by dtype: several times what rounding of inputs and
output gives."""
LARGEST_ERROR_TF32 = 2e-3
"""The same for float32 on a GPU, where kernels may multiply in TF32."""
LARGEST_ERROR_LOSSY = 0.5
"""The same for a lossy provider: far above quantisation, to find results that have nothing to do with the call."""


@dataclasses.dataclass
class Result:
    """One provider at one shape."""

    provider: str
    exact: bool
    problem: str = ""
    """Why there are no times: the call is refused, or an error was raised; empty if there are."""
    refused: bool = False
    """Whether the provider says that it does not serve this call, which is no fault."""
    error: float | None = None
    """Relative error of the output against float64."""
    gradient_error: float | None = None
    """The largest relative error of a gradient; None without a backward."""
    wrong: bool = False
    """Whether the error is larger than rounding explains, or for a lossy provider than quantisation does."""
    ms: float | None = None
    tflops: float | None = None
    """Speed in TFLOP/s; see `workloads.tflop`."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure."""

    shape: Shape
    mask: str
    """A name in `workloads.MASKS`."""
    dtype: torch.dtype
    device: torch.device
    backward: bool
    seconds: float
    """Seconds to measure each provider."""


def measure(
    providers: Sequence[str], setting: Setting, progress: Callable[[str], None] = lambda text: None
) -> list[Result]:
    """Errors and times of providers, in their order.

    Args:
        providers: names of providers that are available here, or "auto".
        progress: called with a short text before each step.
    """
    progress("exact attention")
    causal = setting.mask == "causal"
    try:
        inputs, mask = make(setting)
        exact = reference(inputs[0], inputs[1], inputs[2], mask, causal, setting.backward)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        problem = "not enough memory for the inputs and exact attention"
        return [Result(name, is_exact(name), problem, refused=True) for name in providers]
    results = []
    calls: dict[str, Call] = {}
    for name in providers:
        progress(name)
        result = Result(name, is_exact(name))
        results.append(result)
        result.problem = _too_large(name, setting)
        if result.problem:
            result.refused = True
            continue
        call = call_of(name, inputs, mask, causal, exact if setting.backward else None)
        try:
            compare(call, exact, result, setting)
            calls[name] = call
        except AttentionProviderError as error:
            result.problem, result.refused = str(error), True
        except Exception as error:  # of a kernel or its compiler; the others are still measured
            result.problem, result.refused = (
                f"{type(error).__name__}: {error}".partition("\n")[0],
                _out_of_memory(error),
            )
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    times = milliseconds(calls, setting.device, setting.seconds, progress)
    for result in results:
        if result.provider in times:
            result.ms = times[result.provider]
            result.tflops = tflop(setting.shape, setting.mask, backward=setting.backward) / result.ms * 1e3
    return results


def is_exact(name: str) -> bool:
    return name == "auto" or SPECS[name].capabilities.exact


def _out_of_memory(error: Exception) -> bool:
    """Whether an error is about memory. On a CPU, PyTorch raises a RuntimeError of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _too_large(name: str, setting: Setting) -> str:
    """Why a call does not fit into the memory, for the provider that forms every score; empty if it fits."""
    if name != "_native_math":
        return ""
    shape, device = setting.shape, setting.device
    needed = shape.batch * shape.heads * shape.length**2 * max(12, 3 * setting.dtype.itemsize)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return ""
    if needed <= free:
        return ""
    return f"it forms every score, which needs {needed / 2**30:.0f} GiB of memory, and {free / 2**30:.0f} are free"


def make(setting: Setting) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value as diffusers has them, `[batch, length, heads, head_dim]` in memory and viewed with heads
    first; and the mask."""
    shape, device = setting.shape, setting.device
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.length, shape.heads, shape.head_dim
    inputs = [
        torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(setting.dtype).transpose(1, 2)
        for _ in range(3)
    ]
    if setting.mask in ("none", "causal"):
        return inputs, None
    if setting.mask == "key":
        keys = torch.arange(shape.length, device=device) < max(1, shape.length * 3 // 4)
        return inputs, keys.expand(shape.batch, 1, 1, shape.length)
    pairs = 1, 1, shape.length, shape.length
    if setting.mask == "bias":
        return inputs, torch.randn(pairs, generator=generator, device=device, dtype=setting.dtype)
    dense = (
        torch.rand(pairs, generator=generator, device=device, dtype=torch.float16 if device.type == "cuda" else None)
        < 0.5
    )
    return inputs, dense | torch.eye(shape.length, dtype=torch.bool, device=device)  # no row without a key


def call_of(
    name: str, inputs: Sequence[Tensor], mask: Tensor | None, causal: bool, exact: Reference | None
) -> Callable[[], Any]:
    """A function that computes attention, and with a reference also its gradients."""

    query, key, value = inputs

    def forward() -> Tensor:
        with torch.no_grad(), attention_provider(name):
            return attention_dispatch(query, key, value, mask, is_causal=causal)

    def both() -> tuple[Tensor, tuple[Tensor, ...]]:
        assert exact is not None
        leaves = [each.detach().requires_grad_() for each in inputs]
        with attention_provider(name):
            out = attention_dispatch(leaves[0], leaves[1], leaves[2], mask, is_causal=causal)
            return out, torch.autograd.grad(out, leaves, exact.grad_out)

    return forward if exact is None else both


def compare(call: Callable[[], Any], exact: Reference, result: Result, setting: Setting) -> None:
    """Runs a call, which may compile its kernel, and fills in its errors."""
    found = call()
    synchronize(setting.device)
    if setting.backward:
        found, grads = found
        result.gradient_error = exact.gradient_error(grads)
    result.error = exact.error(found)
    errors = [each for each in (result.error, result.gradient_error) if each is not None]
    largest = LARGEST_ERROR[setting.dtype] if result.exact else LARGEST_ERROR_LOSSY
    if result.exact and setting.dtype == torch.float32 and setting.device.type == "cuda":
        largest = LARGEST_ERROR_TF32
    result.wrong = not all(each <= largest for each in errors)  # also if one is NaN
