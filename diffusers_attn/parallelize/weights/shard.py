"""Shards the weights of several models on all ranks, and gathers them again."""

from __future__ import annotations

import contextlib
import datetime
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...context_parallel.comm import shared_groups
from ...context_parallel.comm.process_groups import resolve
from ...errors import AttentionProviderError
from ...runtime.cuda_graphs.apply import remove_automatic
from . import loading
from .select import ToShard, others

if TYPE_CHECKING:
    from .fsdp import Sharded


class _AppliedSharding(NamedTuple):
    sharded: Sharded
    home: torch.device
    """The device to which the weights return."""
    lease: shared_groups.Lease


_applied: weakref.WeakKeyDictionary[nn.Module, _AppliedSharding] = weakref.WeakKeyDictionary()


def shard(
    pipeline_or_model: Any,
    chosen: Sequence[ToShard],
    device: str,
    mesh: DeviceMesh | None,
    timeout: datetime.timedelta,
    agree: loading.Agree,
) -> None:
    """Shards the weights of the chosen models over all ranks of `mesh`, and moves the pipeline's other models to this
    rank's device. All ranks must call this.

    Args:
        device: device type of the ranks.
        mesh: the ranks; None for all ranks of the job.
        timeout: how long the exchange of weights waits for a rank.
        agree: gathers a value of this rank from all these ranks.

    Raises:
        AttentionProviderError: it failed on some rank, for example for lack of memory. It is raised on all ranks, whose
            pipelines have then to be loaded again.
    """
    from .fsdp import Sharded  # FSDP2's import takes a second

    here = _this_device(device)
    lease = _lease(mesh, timeout, agree)
    group = resolve(lease.names[0]) if lease.names else mesh.get_group(0)  # type: ignore[union-attr]
    # DTensor caches plans by mesh, with the mesh's group. By its name, this mesh differs from those of ended groups.
    weights_mesh = DeviceMesh.from_group(group, device, mesh_dim_names=(f"weights_{group.group_name}",))
    problem: Exception | None = None
    with contextlib.ExitStack() as forget:
        forget.callback(_forget, chosen)
        for name, model, units, _ in chosen:
            remove_automatic(model)
            home = next(model.parameters()).device
            bring: Any = loading.Mover(here)
            if loading.is_on_meta(model):
                home, bring = torch.device("cpu"), _receiver(model, name, pipeline_or_model, here, group, agree)
            try:
                _applied[model] = _AppliedSharding(Sharded(model, units, weights_mesh, bring), home, lease.another())
            except Exception as error:  # every type, since the others must not wait for this rank
                problem = error
            loading.check_all(problem, agree)
        try:
            for each in others(pipeline_or_model, chosen):
                each.to(here)
        except Exception as error:
            problem = error
        loading.check_all(problem, agree)
        forget.pop_all()
    lease.close()


def _forget(chosen: Sequence[ToShard]) -> None:
    """Leaves the models as they are after a failure. Ranks differ in what was done, so they cannot gather weights."""
    for each in chosen:
        applied = _applied.pop(each.model, None)
        if applied is not None:
            applied.lease.close()


def gather(models: Iterable[nn.Module]) -> None:
    """Undoes `shard` for these models: each rank has their full weights, on the device that they came from. All ranks
    must call this. Does nothing for other models."""
    for model in models:
        applied = _applied.pop(model, None)
        if applied is not None:
            applied.sharded.remove(model, applied.home)
            applied.lease.close()


def _receiver(
    model: nn.Module, name: str, pipeline: Any, here: torch.device, group: dist.ProcessGroup, agree: loading.Agree
) -> loading.Receiver:
    loaded: nn.Module | None = None
    problem: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            loaded = loading.load(model, name, pipeline)
        except Exception as error:
            problem = error
    answers = agree(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None and not isinstance(problem, AttentionProviderError):
        raise AttentionProviderError(f"{name} could not be loaded: {answers[0]}") from problem
    if problem is not None:
        raise problem
    if answers[0] is not None:
        raise AttentionProviderError(f"the first rank could not load {name}: {answers[0]}")
    model.eval()  # as `from_pretrained` leaves it
    return loading.Receiver(model, loaded, here, group, agree)


def _lease(mesh: DeviceMesh | None, timeout: datetime.timedelta, agree: loading.Agree) -> shared_groups.Lease:
    """A group of its own for weights, so that their transfers do not wait for those of attention. A part of a larger
    mesh gets none, since all ranks of the job would have to make it: its own group serves both."""
    world = dist.get_world_size()
    if mesh is not None and mesh.size() < world:
        return shared_groups.Lease()
    limit = shared_groups.of_device(timeout)
    return shared_groups.lease(
        ("weights", limit),
        agree,
        lambda number: [dist.new_group(timeout=limit, group_desc="diffusers_attn weights")],
    )


def check_mesh(mesh: DeviceMesh | None) -> None:
    """Raises AttentionProviderError if weights cannot be sharded over this mesh."""
    if mesh is not None and mesh.ndim > 1 and mesh.size() < dist.get_world_size():
        raise AttentionProviderError(
            f"shard_weights with a mesh of {mesh.ndim} dimensions that has {mesh.size()} of the job's "
            f"{dist.get_world_size()} ranks: accepted are a mesh of one dimension, and a mesh of all ranks."
        )


def _this_device(device: str) -> torch.device:
    """This rank's device, which becomes the current one. It is the one with the launcher's local rank, unless the
    process has chosen another already."""
    if device == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.accelerator.current_device_index() == 0 and local < torch.accelerator.device_count():
        torch.accelerator.set_device_index(local)
    return torch.device(device, torch.accelerator.current_device_index())
