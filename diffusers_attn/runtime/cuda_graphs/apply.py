"""Records a model's forward as CUDA graphs, and stops doing so.

A GPU idles between two kernels when a kernel takes less time than its launch by the host. Context parallelism makes
kernels shorter and launches no fewer, and ranks that exchange data in every layer wait for the slowest host. A graph
launches a complete step at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ...errors import AttentionProviderError
from . import obstacles
from .graphed import GraphedForward
from .graphs import Agree, Graphs, NotRecorded, applied
from .group_end import drop_before_groups_end

CudaGraphs = Literal["auto", True, False]
_MAX_GRAPHS = 8


def apply_cuda_graphs(model: nn.Module, *, max_graphs: int = _MAX_GRAPHS) -> nn.Module:
    """Records the forward of `model` as CUDA graphs and replays them when the same kind of call comes again.

    A kind of call is given by shapes, dtypes, arguments that are not tensors, and the provider in scope. The first call
    of a kind runs normally, the second is recorded, and later ones are replayed with the values of their tensors.
    `enable_context_parallel` and `apply_compile` do the same where it is possible (`cuda_graphs="auto"`); with this
    function, a call that cannot be recorded is an error. Tensors are moved to the device and made contiguous first, in
    every call. Outputs equal those of the forward bit for bit, and belong to the caller. Changes in the model between
    two calls (adapters, processors, moved weights, context parallelism) are detected, and the forward is recorded
    again. Ranks that share a sequence must make the same changes; unless inputs="trust", a difference is an error.

    May be combined with `apply_compile(model, "regional")` and `enable_context_parallel`, in any order. The model's own
    hooks run in every call, and so does the comparison of the ranks' inputs. Hooks on its submodules and Python code in
    its forward do not run in a replay.

    Args:
        model: a diffusers model on a CUDA device, for inference. In a pipeline, the model that runs at every step.
        max_graphs: number of kinds of calls to keep; the least recently used is dropped first. All graphs share one
            memory pool, as large as the largest graph needs, in addition to the model's own memory.

    Returns:
        `model`.

    Raises:
        AttentionProviderError: `model` is not a module, is not on a CUDA device, is compiled as one graph, has a
            forward replaced by another tool (offloading) or sharded weights, or records graphs already. In a later
            call: gradients are enabled, an argument is not a tensor, plain value, list or dict, or the forward cannot
            be recorded.
    """
    if not isinstance(model, nn.Module):
        raise AttentionProviderError(
            f"apply_cuda_graphs was given a {type(model).__name__}; a model (torch.nn.Module) is accepted. Of a "
            "pipeline give the model that runs at every step: apply_cuda_graphs(pipe.transformer)."
        )
    if type(max_graphs) is not int or max_graphs < 1:
        raise AttentionProviderError(f"max_graphs={max_graphs!r}: a whole number from 1 on is accepted.")
    name = type(model).__name__
    if model in applied and applied[model].is_automatic:
        remove_cuda_graphs(model)
    if model in applied:
        raise AttentionProviderError(
            f"this {name} records CUDA graphs already. Call remove_cuda_graphs(model) first, to change max_graphs."
        )
    if "forward" in vars(model):
        raise AttentionProviderError(
            f"the forward of this {name} was replaced, as offloading and diffusers' hooks do (its own context "
            "parallelism, caching, layerwise casting). A CUDA graph would repeat what they did in one call, and "
            "read weights where they were then. Remove them first (pipe.remove_all_hooks())."
        )
    if model._compiled_call_impl is not None:
        raise AttentionProviderError(
            f"this {name} is compiled as a whole, and its forward is no longer called by itself. Use "
            'apply_compile(model, "regional"), or let the compiler record it: apply_compile(model, "full", '
            'mode="reduce-overhead").'
        )
    if obstacles.has_sharded_weights(model):
        raise AttentionProviderError(
            f"the weights of this {name} are sharded (FSDP2, shard_weights): every forward gathers them into new "
            "memory, and a CUDA graph would read them where they were. Leave CUDA graphs out, or do not shard the "
            "weights."
        )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if {device.type for device in devices} != {"cuda"} or len(devices) > 1:
        raise AttentionProviderError(
            f"this {name} is on {', '.join(sorted(map(str, devices))) or 'no device'}; CUDA graphs need all of it on "
            "one CUDA device. Move it there before: pipe.to('cuda')."
        )
    _install(model, Graphs(devices.pop(), max_graphs, None))
    return model


def remove_cuda_graphs(model: nn.Module) -> None:
    """Undoes `apply_cuda_graphs` and frees the memory of the graphs. Does nothing if it was not applied."""
    if applied.pop(model, None) is not None:
        if isinstance(vars(model).get("forward"), GraphedForward):
            del model.forward
        # What another tool put around it since calls it still, and it calls the forward.
        torch.cuda.empty_cache()


def is_applied_by_hand(model: nn.Module) -> bool:
    """Whether `apply_cuda_graphs` was called for `model`, by its user."""
    return model in applied and not applied[model].is_automatic


def check_mode(mode: object) -> None:
    """Raises AttentionProviderError unless `mode` is one of `CudaGraphs`."""
    if mode != "auto" and not isinstance(mode, bool):
        raise AttentionProviderError(f"cuda_graphs={mode!r}: accepted are 'auto', True and False.")


def apply_automatically(model: nn.Module) -> None:
    """Records the forward of `model` on this process's GPU where that is possible; other calls run as usual. See
    `graphed`. Does nothing if CUDA graphs were applied already, or if the model cannot be recorded: a forward that
    offloading has put there stays."""
    if model not in applied and why_not(model) is None:
        _install(model, Graphs(_device(model), _MAX_GRAPHS, _alone))


def apply_on_ranks(model: nn.Module, agree: Agree | None) -> None:
    """Records the forward of `model`, which is split over several ranks, until `leave_ranks`.

    Args:
        model: if `agree` is given, a model without an obstacle (`why_not`).
        agree: gives this rank's reason against a recording to all ranks, and returns those of all. None: a call that
            cannot be recorded is an error.
    """
    graphs = applied.get(model)
    if graphs is not None and (not graphs.is_automatic or agree is not None):
        graphs.clear()
        graphs.agree = agree if graphs.is_automatic else None
        return
    if agree is None:
        apply_cuda_graphs(model)
    else:
        _install(model, Graphs(_device(model), _MAX_GRAPHS, agree))
    applied[model].by_ranks = True


def leave_ranks(model: nn.Module) -> None:
    """Undoes `apply_on_ranks`. Graphs from before stay applied, without their recordings: NCCL does not end a group
    that a CUDA graph uses."""
    graphs = applied.get(model)
    if graphs is None:
        return
    graphs.clear()
    if graphs.by_ranks:
        remove_cuda_graphs(model)
    elif graphs.is_automatic:
        graphs.agree = _alone


def remove_automatic(model: nn.Module) -> None:
    """Undoes `apply_automatically`."""
    if model in applied and applied[model].is_automatic:
        remove_cuda_graphs(model)


def why_not(model: nn.Module) -> str | None:
    """Why `model` cannot be recorded as it is now, as a clause; None if it can, or is recorded already."""
    if model in applied:
        return None
    if "forward" in vars(model):
        return "its forward was replaced (by offloading or a hook of diffusers)"
    return obstacles.of_model(model)


@dataclasses.dataclass(frozen=True)
class CudaGraphsStatus:
    """How a model's calls run, see `cuda_graphs_status`."""

    recorded: int
    """Number of kinds of calls with a graph."""
    replays: int
    """Number of calls that were replays."""
    pool_mib: int
    """Memory of the graphs, in MiB."""
    reasons: tuple[str, ...]
    """Why calls run without a graph; empty if nothing is in the way."""


def cuda_graphs_status(model: nn.Module) -> CudaGraphsStatus | None:
    """How many kinds of calls of `model` have a CUDA graph, its replays and memory, and why other calls have none.
    None if no CUDA graphs were applied to this model."""
    graphs = applied.get(model)
    if graphs is None:
        return None
    found = [each.reason for each in graphs.recordings.values() if isinstance(each, NotRecorded)]
    return CudaGraphsStatus(
        graphs.recorded,
        graphs.replays,
        graphs.pool_mib,
        tuple(dict.fromkeys(found + ([graphs.off] if graphs.off else []))),
    )


def _alone(reason: str | None) -> Sequence[str | None]:
    return (reason,)


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device


def _install(model: nn.Module, graphs: Graphs) -> None:
    drop_before_groups_end()
    applied[model] = graphs
    model.forward = GraphedForward(model)
