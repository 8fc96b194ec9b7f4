"""The attention of the models to split, as the cost model describes it: sizes, layers, and the speed of the kernel."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..providers import speeds
from ..providers.catalog import SPECS
from ..providers.hardware import ATTENTION_OF_MATRIX_FLOPS, TILES_OF_MEASURED, Hardware
from .cost import Workload, peak_flops
from .targets import Target, split_attention
from .typical_tokens import typical_tokens


def workloads(
    targets: Sequence[Target],
    providers: Iterable[str],
    capability: tuple[int, int] | None,
    hardware: Hardware,
    tokens_of: Callable[[Target, str], int] = lambda target, name: typical_tokens(type(target.model)),
) -> tuple[Workload, ...]:
    """The split attention of these models, one workload for each size.

    Args:
        providers: names of the attention providers in use; the slowest counts.
        capability: compute capability of the GPU; None on other devices.
        tokens_of: number of tokens of an attention module, given its model and name. Default: the typical number.
    """
    found: collections.Counter[Workload] = collections.Counter()
    for target in targets:
        itemsize = _itemsize(target.model)
        for name, module, heads, kv_heads in split_attention(target):
            tokens = tokens_of(target, name)
            head_dim = _head_dim(module, heads)
            flops = attention_flops(providers, capability, head_dim, tokens, hardware)
            overlapped = _weights_overlapped(target.model, name, module)
            found[Workload(tokens, heads, kv_heads, head_dim, 1, flops, itemsize, overlapped)] += 1
    return tuple(work._replace(layers=count) for work, count in found.items())


def attention_flops(
    providers: Iterable[str], capability: tuple[int, int] | None, head_dim: int, tokens: int, hardware: Hardware
) -> float:
    """Floating-point operations per second of attention with all multiprocessors busy: as measured for the GPU (the
    table in `speeds.py`), otherwise estimated from the speed of matrix products."""
    _, table = speeds.measured(capability, head_dim)
    long = tokens >= speeds.LONG
    known = [_measured(name, table, long) for name in providers]
    if not known or None in known:
        return ATTENTION_OF_MATRIX_FLOPS * hardware.matrix_flops
    slowest = min(each for each in known if each is not None)
    return peak_flops(slowest * 1e12, TILES_OF_MEASURED[long], hardware.multiprocessors)


def _measured(provider: str, table: dict[str, tuple[float, float]], long: bool) -> float | None:
    """TFLOP/s in the table; None if it is not there. "auto" and "scope" are as fast as the fastest exact kernel that
    PyTorch has, because it is not known yet which kernels serve the calls."""
    if provider in ("auto", "native", "scope"):
        exact = [table[name][long] for name in table if name.startswith("_native") and SPECS[name].capabilities.exact]
        return max(exact, default=None)
    return table[provider][long] if provider in table else None


def _head_dim(module: Any, heads: int) -> int:
    """The size of a head. diffusers' classes use different names; the width of the first projection is in all."""
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    width = getattr(module, "inner_dim", None)
    if not isinstance(width, int):
        width = next((each.in_features for each in module.children() if isinstance(each, nn.Linear)), heads)
    return max(1, width // heads)


def _weights_overlapped(model: nn.Module, name: str, module: Any) -> int:
    """The number of weights of the query's projection, and of an MLP that runs in parallel with attention."""
    block: Any = model.get_submodule(name.rpartition(".")[0])
    linear = (getattr(module, "to_q", None), getattr(block, "proj_mlp", None))
    return sum(each.in_features * each.out_features for each in linear if isinstance(each, nn.Linear))


def _itemsize(model: nn.Module) -> int:
    """Bytes of an element of the activations. Weights may be quantised, activations are not."""
    dtypes = [each.dtype for each in model.parameters() if each.dtype.is_floating_point and each.dtype.itemsize > 1]
    return min((dtype.itemsize for dtype in dtypes), default=torch.float32.itemsize)
