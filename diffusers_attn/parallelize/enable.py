"""Enables context parallelism for a pipeline or a model, and disables it.

Every rank first checks everything and makes its choices (`choices.py`). The ranks compare them, so that all ranks
enable it or none does. Only then do models change (`attach.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..context_parallel import job
from ..context_parallel.comm import meetings, rank_progress, shared_groups
from ..context_parallel.comm.activity import IDLE
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.mesh import AXES, ContextParallelMesh
from ..cp_plans.plan import Plan
from ..errors import AttentionProviderError
from ..providers.catalog import AttentionProvider
from ..runtime.cuda_graphs.apply import CudaGraphs
from ..vae.split import SplitVae, unsplit_vae
from .attach import attach, attach_vae, detach
from .choices import Choices, choose, config_for
from .decide import decide_degrees
from .guidance import choose_guidance
from .mesh_degrees import GivenDegrees, degrees_of
from .record import record
from .report import ContextParallelReport
from .same_choices import choose_on_all_ranks
from .targets import device_of, models_of
from .weights.select import ShardWeights, device_to_use
from .weights.shard import check_mesh, gather, shard

log = logging.getLogger(__name__)


def enable_context_parallel(
    pipeline_or_model: Any,
    *,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    guidance_degree: int | None = None,
    data_degree: int | None = None,
    provider: str | AttentionProvider | None = None,
    rotate_method: str | None = None,
    convert_to_fp32: bool = True,
    plan: Plan | None = None,
    mesh: DeviceMesh | None = None,
    inputs: Literal["broadcast", "check", "trust"] = "broadcast",
    timeout: datetime.timedelta | float | None = None,
    check_weights: bool = False,
    cuda_graphs: CudaGraphs = "auto",
    split_vae: SplitVae = "auto",
    shard_weights: ShardWeights = False,
    verbose: bool = True,
    **provider_options: object,
) -> ContextParallelReport:
    """Splits the sequences of a pipeline's transformers, or of one model, between ranks. All these ranks must call it.

    Args:
        pipeline_or_model: a diffusers pipeline, of which every component with a plan is split; or one such model, which
            may be compiled or inside a PEFT model. It must be on its device already, unless `shard_weights` moves it.
        ulysses_degree: number of ranks that exchange heads. `ulysses_degree * ring_degree` must be the number of ranks.
            None: it follows from the other degree, or those with the shortest predicted time are chosen
            (docs/cost_model.md). The environment variable DIFFUSERS_ATTN_LINKS says whether the speed of the links
            between ranks is measured for it; see `measure_hardware.py`.
        ring_degree: number of ranks that pass keys and values around; None as for `ulysses_degree`.
        guidance_degree: number of groups of ranks that compute different branches of guidance; sequences are split
            within a group. This needs one exchange per step. But tokens are divided among fewer ranks, so that each
            needs more memory for activations. `ulysses_degree` and `ring_degree` are then those of a group. None: for a
            pipeline, without `mesh` and other degrees, as many groups as divide the ranks and the branches; calls
            without guidance are split over all ranks. 1: branches are not divided, as with inputs="check".
        data_degree: number of parts of a batch, each for a group of ranks, as with several prompts or several images of
            a prompt. The ranks are `data_degree * guidance_degree * ring_degree * ulysses_degree`. Parts may differ
            by one sample; a batch with fewer samples than parts is not divided. None: where guidance is divided, its
            groups divide batches too, into as many equal parts as possible. 1: batches are not divided, except into
            branches of guidance.
        provider: name of the attention kernel. None: attention bound to a `DispatchProcessor` keeps its provider, and
            all other attention uses "auto" on CUDA devices and "native" elsewhere.
        rotate_method: how keys and values travel in a ring: "allgather" or "alltoall". None: chosen with the
            degrees.
        convert_to_fp32: merges partial results of a ring in float32 if True, in the query's dtype if False.
        plan: where tensors are split and gathered, see `diffusers_attn.cp_plans.plan`. None: the plan registered for
            the model's class.
        mesh: the ranks that share a sequence, as a DeviceMesh. One dimension is a ring, or Ulysses if it is named
            "ulysses"; two dimensions must be named "ring" and "ulysses". It may be part of a larger mesh. Or a mesh of
            all ranks of the job with a dimension named "data" or "guidance", which stands for these degrees. None: all
            ranks of the job.
        inputs: what happens when the ranks' inputs differ. "broadcast": all ranks use the first rank's tensors.
            "check": an error names the inputs that differ; every forward then waits for the device. "trust": inputs are
            not compared. Under "broadcast" and "check", these differences are errors: shapes, arguments that are not
            tensors, the number of calls, adapters and processors.
        timeout: how long a rank waits for the others, in seconds or as a timedelta. None: the timeout of
            `init_process_group` while a rank computes, and 60 s at most while none does (its processes use less than
            2 % of a core). Groups of `mesh` get this timeout if it is given here, or if they have PyTorch's default.
            The error after a timeout names the missing rank. NCCL's own errors name no rank, so NCCL waits a quarter
            longer; where hosts do not meet (inputs="trust", or in the last forward), an error that names the rank is
            logged first. With gloo, a process that waits within a forward while no rank computes logs it and ends.
        check_weights: compares the values of all weights once, in this call, which reads them all. Names and shapes of
            weights and the values of adapters are always compared. Adapters are compared again in forwards without
            gradients after they have changed, hot-swapped ones too; but writes through `weight.data`, such as
            `weight.data.copy_(other)`, go unnoticed. After them, disable and enable context parallelism on all ranks.
        cuda_graphs: whether a model's forward is recorded as CUDA graphs, see `apply_cuda_graphs`. "auto": the forward
            is recorded where that is possible and gives the same bits, on CUDA devices, under `torch.no_grad()`; other
            calls run as usual, and `cuda_graphs_status(model)` tells why. True: a call that cannot be recorded is an
            error. False: nothing is recorded.
        split_vae: whether the pipeline's VAEs are split by rows of the image, in encoding and decoding: see
            `diffusers_attn.split_vae`. "auto": video VAEs are, except in calls that record gradients. True: every VAE
            is, and a call that records gradients is an error. False: every rank computes whole images.
        shard_weights: whether each rank holds only its part of the weights, for models that do not fit. Ranks gather
            the weights of a block before it runs, with FSDP2. True: those of all transformers and text encoders; or
            names of components, such as ("transformer", "text_encoder"). The pipeline may be in CPU memory, or these
            components on the meta device: this call moves everything to the ranks' devices, one block at a time. For
            inference; sharded weights are not trained. See docs/memory.md#weights-that-do-not-fit.
        verbose: whether rank 0 prints the report. It is logged at level "info" otherwise.
        provider_options: options of the provider's kernel.

    Returns:
        A report of the models, degrees and provider chosen, with the reason. It prints as one line.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine; the message says how to install it.
        AttentionProviderError: context parallelism cannot be enabled; the message says what to do. No rank is changed,
            unless weights could not be moved or sharded (`shard_weights`), which the message says.
    """
    named = degrees_of(mesh, GivenDegrees(data_degree, guidance_degree, ring_degree, ulysses_degree))
    if named is not None:
        mesh, (data_degree, guidance_degree, ring_degree, ulysses_degree) = None, named
    device = device_to_use(pipeline_or_model, mesh, shard_weights)
    pipeline = _reference(pipeline_or_model)
    joined = job.join(device)
    shared_groups.end_unused()
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise AttentionProviderError(
            f"mesh is a {type(mesh).__name__}; a torch DeviceMesh is accepted, and None for all ranks of the job."
        )
    sharing = None if mesh is None else ContextParallelMesh.from_mesh(mesh)
    axes = [None] if mesh is None else [mesh.get_group(dim) for dim in _dims(mesh)]
    members = list(range(dist.get_world_size())) if mesh is None else mesh.mesh.flatten().tolist()
    rank_progress.note_enabling(f"enable_context_parallel of a {type(pipeline_or_model).__name__}")
    with contextlib.suppress(AttentionProviderError):  # all ranks refuse it below
        patience = shared_groups.as_timeout(timeout, device).total_seconds()
        rank_progress.wait_for_idle_ranks(IDLE if timeout is None else max(IDLE, patience))  # others may still load
    meetings.meet(members, shared_groups.as_timeout(None, device))

    def choose_here() -> Choices:
        if joined:
            job.check_gpu(device_of(pipeline_or_model))
        if shard_weights is not False:
            check_mesh(mesh)
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
            cuda_graphs=cuda_graphs,
            split_vae=split_vae,
            shard_weights=shard_weights,
            guidance_degree=guidance_degree,
            data_degree=data_degree,
        )

    with rank_progress.waiting_for(members):
        chosen = choose_on_all_ranks(choose_here, axes)
        degrees = chosen.degrees or decide_degrees(chosen.topology, chosen.targets, chosen.providers)
        guidance = choose_guidance(
            guidance_degree,
            data_degree,
            mesh is None and ulysses_degree is None and ring_degree is None and pipeline() is not None,
            chosen.topology,
            chosen.targets,
            chosen.providers,
            ulysses_degree,
            ring_degree,
            inputs,
        )
    rank_progress.wait_for_idle_ranks(IDLE if timeout is None else chosen.timeout.total_seconds())
    config = config_for(degrees, convert_to_fp32)
    if sharing is None:
        sharing = ContextParallelMesh.from_degrees(
            config.ring_degree,
            config.ulysses_degree,
            device_type=device,
            rotate_method=config.rotate_method,
            convert_to_fp32=convert_to_fp32,
            timeout=chosen.timeout,
        )
    else:
        sharing = ContextParallelMesh.of(sharing, rotate_method=config.rotate_method, convert_to_fp32=convert_to_fp32)
        for axis in axes:
            shared_groups.give_timeout(axis, chosen.timeout, device, always=timeout is not None)  # type: ignore[arg-type]
    names = [group.name for group in (sharing.ring, sharing.ulysses) if group.size > 1]
    sharers = everyone(dist.get_rank(), [resolve(name) for name in names])
    rank_progress.belongs_to(names, sharers)
    lease = sharing.lease or shared_groups.Lease()  # `attach` gives each model its own
    sharing = dataclasses.replace(sharing, lease=None)
    with contextlib.ExitStack() as undo_all:  # an error restores every model
        if chosen.weights:
            undo_all.callback(gather, [each.model for each in chosen.weights])
            agree = functools.partial(everyone, groups=axes)
            shard(pipeline_or_model, chosen.weights, device, mesh, chosen.timeout, agree)
        for target in chosen.targets:
            undo_all.callback(detach, target.model)
            attach(target, sharing, lease, sharers, chosen, guidance, pipeline)
        for vae in chosen.vaes:
            undo_all.callback(unsplit_vae, vae.vae)
            attach_vae(vae, sharing, lease, chosen)
        graphs = record(chosen, device)
        undo_all.pop_all()
    lease.close()
    report = ContextParallelReport(
        models=tuple(target.name for target in chosen.targets),
        without_plan=tuple(chosen.without_plan),
        ulysses_degree=degrees.ulysses_degree,
        ring_degree=degrees.ring_degree,
        rotate_method=degrees.rotate_method,
        reason=degrees.reason,
        guidance="" if guidance is None else str(guidance),
        provider=", ".join(chosen.providers),
        inputs=inputs,
        cuda_graphs=graphs,
        split_vaes=tuple(vae.name for vae in chosen.vaes),
        ranks=tuple(range(dist.get_world_size()) if mesh is None else mesh.mesh.flatten().tolist()),
        world_size=dist.get_world_size(),
        sharded_weights=tuple(each.name for each in chosen.weights),
    )
    if verbose and dist.get_rank() == 0:
        print(report, flush=True)
    elif not verbose:
        log.info("%s", report)
    return report


def disable_context_parallel(pipeline_or_model: Any) -> None:
    """Undoes `enable_context_parallel`: removes its hooks and restores the former processors. Does nothing where
    context parallelism is not enabled.

    Weights that were sharded (`shard_weights`) are gathered: every rank has all of them again, on the device where they
    were before, or in CPU memory if they came from the meta device. All ranks must call this then.

    Copies of a split model (`copy.deepcopy`, pickle, `torch.save`) are not split: they have the former processors and
    no hooks, so they need no call of this function.

    Args:
        pipeline_or_model: a diffusers pipeline or a model, as for `enable_context_parallel`.

    Raises:
        AttentionProviderError: the argument is neither a model nor a pipeline, or is a shallow copy of a split model.
    """
    models = models_of(pipeline_or_model)
    for model in models:
        detach(model)
        unsplit_vae(model)
    gather(models)
    shared_groups.end_unused()


def _reference(pipeline_or_model: Any) -> Callable[[], Any]:
    """Returns the pipeline, without keeping it alive; None for a model."""
    return (lambda: None) if isinstance(pipeline_or_model, nn.Module) else weakref.ref(pipeline_or_model)


def _dims(mesh: DeviceMesh) -> list[int]:
    """Indices of the mesh's dimensions, the ring's first: the order in which shards are numbered."""
    names = mesh.mesh_dim_names or ()
    return [names.index(axis) for axis in AXES] if mesh.ndim == 2 else [0]
