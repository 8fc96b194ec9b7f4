"""Context parallelism for a pipeline or a model, in one call, and off again.

Everything is looked up and checked first, on every rank; the ranks tell each other what they found, so that all of them
enable it or none does; and only then are models changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..context_parallel import job
from ..context_parallel.comm import rank_progress, shared_groups
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.mesh import AXES, ContextParallelMesh
from ..cp_plans.plan import Plan
from ..errors import AttentionProviderError
from ..providers.catalog import AttentionProvider
from .attach import attach, detach
from .choices import Choices, choose, choose_on_all_ranks
from .report import ContextParallelReport
from .targets import device_type, models_of


def enable_context_parallel(
    pipeline_or_model: Any,
    *,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    provider: str | AttentionProvider | None = None,
    rotate_method: str | None = None,
    convert_to_fp32: bool = True,
    plan: Plan | None = None,
    mesh: DeviceMesh | None = None,
    inputs: Literal["broadcast", "check", "trust"] = "broadcast",
    timeout: datetime.timedelta | float | None = None,
    check_weights: bool = False,
    verbose: bool = True,
    **provider_options: object,
) -> ContextParallelReport:
    """Shares every sequence of a pipeline's transformers, or of a model, between ranks. All of these must call it.

    Args:
        pipeline_or_model: a diffusers pipeline: every component that has a plan is meant; or such a model by itself,
            also compiled or within a PEFT model. On its device already.
        ulysses_degree, ring_degree: ranks that exchange heads, and ranks between which keys and values travel. Their
            product is the number of ranks; what is None follows, or is chosen by the rules in `degrees.py`.
        provider: the attention kernel, by name. None leaves attention that a `DispatchProcessor` is bound to as it is,
            and gives the rest to "auto" on CUDA devices and to "native" elsewhere.
        rotate_method: of a ring: "allgather" or "alltoall"; see `ContextParallelConfig`.
        convert_to_fp32: whether partial results of a ring merge in float32; otherwise in the dtype of the query.
        plan: what is split, see `diffusers_attn.cp_plans.plan`; None takes the one registered for a model's class.
        mesh: the ranks that share a sequence, as a DeviceMesh of one dimension (a ring; or Ulysses, if it is named
            "ulysses") or two, named "ring" and "ulysses"; it may be a part of a larger one. None is all ranks.
        inputs: what becomes of inputs that differ between these ranks. "broadcast": all use those of the first rank;
            "check": an error names them, at the price of waiting for the device in every forward; "trust": nothing
            looks in a forward. In the first two, differing shapes and differing arguments that are no tensors are
            errors, and so are another number of calls, and adapters or processors that are not alike.
        timeout: how long a rank waits for the others, in seconds or as a timedelta; None is the job's own
            (`init_process_group(timeout=...)`). Groups of `mesh` are given it too, where it is named here or they have
            PyTorch's default. Then the error of those that waited names the rank that is missing. NCCL,
            whose errors name none, waits a quarter longer; where hosts do not meet (inputs="trust", or in the last
            forward) the rank is named in an error that is logged before.
        check_weights: whether values of all weights are compared once, now, which reads them all. (Names and shapes of
            weights are compared in any case, and so are values of adapters.)
        verbose: whether rank 0 prints the report.
        provider_options: options of the provider's kernel.

    Returns:
        What was done, and why.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine; says how to install it.
        AttentionProviderError: anything else that cannot be done, with the remedy. Then nothing changed, on any rank.
    """
    device = device_type(pipeline_or_model)
    job.join(device)
    shared_groups.end_unused()
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise AttentionProviderError(
            f"mesh is a {type(mesh).__name__}; a torch DeviceMesh is accepted, and None for all ranks of the job."
        )
    sharing = None if mesh is None else ContextParallelMesh.from_mesh(mesh)
    axes = [None] if mesh is None else [mesh.get_group(dim) for dim in _dims(mesh)]
    members = list(range(dist.get_world_size())) if mesh is None else mesh.mesh.flatten().tolist()
    rank_progress.note_enabling(f"enable_context_parallel of a {type(pipeline_or_model).__name__}")
    rank_progress.meet(members, shared_groups.as_timeout(None, device))

    def choose_here() -> Choices:
        return choose(
            pipeline_or_model,
            device,
            sharing,
            plan=plan,
            ulysses_degree=ulysses_degree,
            ring_degree=ring_degree,
            rotate_method=rotate_method,
            convert_to_fp32=convert_to_fp32,
            provider=provider,
            provider_options=provider_options,
            inputs=inputs,
            timeout=timeout,
            check_weights=check_weights,
        )

    with rank_progress.waiting_for(members):
        chosen = choose_on_all_ranks(choose_here, axes)
    if sharing is None:
        sharing = ContextParallelMesh.from_degrees(
            chosen.config.ring_degree,
            chosen.config.ulysses_degree,
            device_type=device,
            rotate_method=chosen.config.rotate_method,
            convert_to_fp32=convert_to_fp32,
            timeout=chosen.timeout,
        )
    else:
        sharing = ContextParallelMesh.of(
            sharing, rotate_method=chosen.config.rotate_method, convert_to_fp32=convert_to_fp32
        )
        for axis in axes:
            shared_groups.give_timeout(axis, chosen.timeout, device, always=timeout is not None)  # type: ignore[arg-type]
    names = [group.name for group in (sharing.ring, sharing.ulysses) if group.size > 1]
    sharers = everyone(dist.get_rank(), [resolve(name) for name in names])
    rank_progress.belongs_to(names, sharers)
    lease = sharing.lease or shared_groups.Lease()  # each model has one of its own
    sharing = dataclasses.replace(sharing, lease=None)
    with contextlib.ExitStack() as undo_all:  # whatever fails after all, nothing stays
        for target in chosen.targets:
            undo_all.callback(detach, target.model)
            attach(target, sharing, lease, sharers, chosen)
        undo_all.pop_all()
    lease.close()
    report = ContextParallelReport(
        models=tuple(target.name for target in chosen.targets),
        whole=tuple(chosen.without_plan),
        ulysses_degree=chosen.degrees.ulysses_degree,
        ring_degree=chosen.degrees.ring_degree,
        rotate_method=chosen.degrees.rotate_method,
        reason=chosen.degrees.reason,
        provider=", ".join(chosen.providers),
        inputs=inputs,
        ranks=tuple(range(dist.get_world_size()) if mesh is None else mesh.mesh.flatten().tolist()),
        world_size=dist.get_world_size(),
    )
    if verbose and dist.get_rank() == 0:
        print(report, flush=True)
    return report


def disable_context_parallel(pipeline_or_model: Any) -> None:
    """Takes off what `enable_context_parallel` put on, and puts back the processors that were there: models are then
    as they were. Without effect where it is not enabled.

    Copies of a model that is split (`copy.deepcopy`, pickle, `torch.save`) are not: they come without its hooks, with
    the processors that are put back here.

    Raises:
        AttentionProviderError: neither a model nor a pipeline was given; or a shallow copy of a model that is split.
    """
    for model in models_of(pipeline_or_model):
        detach(model)
    shared_groups.end_unused()


def _dims(mesh: DeviceMesh) -> list[int]:
    """The dimensions of a mesh, the ring's first, as shards are counted."""
    names = mesh.mesh_dim_names or ()
    return [names.index(axis) for axis in AXES] if mesh.ndim == 2 else [0]
