"""Reasons why a model, or one call of it, is not recorded as a CUDA graph.

A replay launches kernels and runs no Python. So a model is recorded only if nothing in its forward needs Python to run:
no hook of another tool on its modules, no replaced forward, no mode that watches operations. Whatever this file cannot
see is found by `graphed.py`, which compares the first replay with the forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...context_parallel.compile.own_forward import is_replaced
from ...providers.catalog import SPECS

_OWN = __name__.partition(".")[0]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_MIB = 2**20
_RESERVE = 0.1
"""Share of a device's memory that stays free for the rest of a pipeline, such as its VAE."""


def of_model(model: nn.Module) -> str | None:
    """Why no forward of `model` can be recorded, as a clause; None if it can. Takes about a millisecond for a model of
    a thousand modules."""
    if model._compiled_call_impl is not None:
        return "it is compiled as a whole"
    if has_sharded_weights(model):
        return "its weights are sharded, and gathered into new memory in every forward"
    for name, module in model.named_modules():
        where = f"'{name}' ({type(module).__name__})" if name else "it"
        if module is not model and is_replaced(module):
            return f"the forward of {where} was replaced (by offloading, caching or layerwise casting)"
        foreign = None if module is model else foreign_hook(module)
        if foreign is not None:
            return f"{where} has a hook of another tool ({foreign}), which a replay would not run"
        choice = getattr(getattr(module, "processor", None), "choice", None)
        provider = getattr(choice, "provider", None)
        if provider in SPECS and not SPECS[provider].capabilities.cuda_graph:
            return f"a CUDA graph cannot hold the kernel of provider {provider!r}"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"it is on {' and '.join(sorted(map(str, devices))) or 'no device'}, not on one CUDA device"
    return None


def has_sharded_weights(model: nn.Module) -> bool:
    """Whether FSDP2 shards weights of `model`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a second
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def foreign_hook(module: nn.Module, *, before_forward: bool = False) -> str | None:
    """The name of a hook of another tool on `module`; None if there is none.

    Args:
        before_forward: looks only at hooks that run before the forward.
    """
    for kind in _HOOKS[:1] if before_forward else _HOOKS:
        for hook in getattr(module, kind).values():
            function = getattr(hook, "func", hook)  # of functools.partial
            owner = getattr(function, "__module__", None) or type(function).__module__
            if owner.partition(".")[0] != _OWN:
                return f"{owner}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return None


def of_mode(owns_forward: bool) -> str | None:
    """Why no call is recorded in the present mode of this thread; None if it may be.

    Args:
        owns_forward: whether the model's forward is still the one that records.
    """
    if not owns_forward:
        return "its forward was replaced (by offloading or a hook of diffusers)"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if is_watched():
        return "a TorchDispatchMode watches its operations"
    return None


def is_watched() -> bool:
    """Whether a TorchDispatchMode is active: a replay runs no operation that it could watch. (PyTorch has no public
    function for it.)"""
    return bool(torch._C._len_torch_dispatch_stack())


def of_tensors(tensors: Iterable[Tensor], device: torch.device) -> str | None:
    """Why a call with these tensors is not recorded; None if it may be. A tensor elsewhere is not moved: where a value
    is computed can change its rounding."""
    elsewhere = {tensor.device for tensor in tensors} - {device}
    return f"an argument is on {elsewhere.pop()}, and the model on {device}" if elsewhere else None


def of_memory(device: torch.device) -> str | None:
    """Why too little memory is free to record the forward that ran last; None if enough stays free.

    A graph has memory of its own, as much as its forward takes beyond weights. The peak of this process's allocated
    memory is an upper bound.
    """
    allocated = torch.cuda.memory_allocated(device)
    needed = torch.cuda.max_memory_allocated(device) - allocated
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - allocated
    reserve = int(_RESERVE * total)
    if free >= needed + reserve:
        return None
    return (
        f"it would need up to {needed // _MIB} MiB, and {free // _MIB} MiB are free, of which {reserve // _MIB} MiB "
        "are kept for the rest of the pipeline"
    )
