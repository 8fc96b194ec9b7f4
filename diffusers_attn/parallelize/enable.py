"""Context parallelism for a pipeline or a model, in one call, and off again.

Everything is looked up and checked first, on every rank; the ranks tell each other what they found, so that all of them
enable it or none does; and only then are models changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from ..context_parallel import job
from ..context_parallel.comm import one_thread, rank_progress, shared_groups, stalls
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.comm.rank_differences import differences
from ..context_parallel.config import ContextParallelConfig
from ..context_parallel.hooks import copies
from ..context_parallel.hooks.apply import apply_context_parallel, names_of_groups, remove_context_parallel
from ..context_parallel.mesh import AXES, ContextParallelMesh
from ..cp_plans.plan import CPCache, ParamId, Plan, entries
from ..errors import AttentionProviderError
from ..processors.binding import attention_modules_of, change_processor, install, is_noted
from ..processors.bound import BoundProcessor, bind, obstacle, unbind
from ..processors.dispatch import DispatchProcessor
from ..providers.catalog import SPECS, AttentionProvider, options_by_place
from ..scope import ProviderChoice
from .degrees import Degrees, Topology, complete_degrees
from .forward_count import Forwards, NoteForward
from .input_sync import MODES, InputSync, Links
from .model_sync import Adapters, described_model, described_plan, versions
from .report import ContextParallelReport
from .targets import Target, device_type, find_targets, models_of, split_heads


class _Enabled(NamedTuple):
    """What was done to a model. Without a reference to it, so that it is not kept alive."""

    hooks: list[RemovableHandle | stalls.Watch]
    leases: list[shared_groups.Lease]
    """of the process groups that it uses."""
    forwards: list[Forwards]
    processors: list[tuple[weakref.ref[nn.Module], Any]]
    """the modules that were bound, with what they had before."""


_enabled: weakref.WeakKeyDictionary[nn.Module, _Enabled] = weakref.WeakKeyDictionary()


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

    def choose() -> _Choices:
        if inputs not in MODES:
            raise AttentionProviderError(f"inputs={inputs!r}: accepted are {', '.join(map(repr, MODES))}.")
        targets, whole = find_targets(pipeline_or_model, plan)
        request = _request(provider, provider_options, device)
        names = _provider_names(targets, request, rebind=provider is not None)
        by_place = _options_by_place(targets, request, rebind=provider is not None)
        topology = _topology(targets, names, device, sharing, rotate_method, by_place)
        degrees = _degrees(topology, names, sharing, ulysses_degree, ring_degree, by_place)
        config = _config(degrees, convert_to_fp32)
        limit = shared_groups.as_timeout(timeout, device)
        return _Choices(targets, whole, request, names, degrees, config, limit, _facts(targets, request, check_weights))

    with rank_progress.waiting_for(members):
        chosen = _choose_on_all_ranks(choose, axes, inputs)
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
            undo_all.callback(_take_off, target.model)
            _put_on(target, sharing, lease, inputs, chosen.timeout, chosen.request, rebind=provider is not None)
            if device != "cpu":  # where exchanges do not fail, but hang
                _enabled[target.model].hooks.append(stalls.Watch(sharers, chosen.timeout))
        undo_all.pop_all()
    lease.close()
    report = ContextParallelReport(
        models=tuple(target.name for target in chosen.targets),
        whole=tuple(chosen.whole),
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
        _take_off(model)
    shared_groups.end_unused()


class _Choices(NamedTuple):
    """All decisions, before anything changes."""

    targets: list[Target]
    whole: list[str]
    request: DispatchProcessor
    providers: list[str]
    degrees: Degrees
    config: ContextParallelConfig
    timeout: datetime.timedelta
    facts: dict[str, str]
    """what all ranks must have alike, by name."""


def _facts(targets: Sequence[Target], request: DispatchProcessor, check_weights: bool) -> dict[str, str]:
    facts = versions() | {"provider": repr(request.choice), "check_weights": repr(check_weights)}
    for target in targets:
        found = described_plan(target.plan) | Adapters(target.model).said(in_training=True)
        found |= described_model(target.model, check_weights)
        facts |= {f"{target.name}: {name}": value for name, value in found.items()}
    return facts


def _choose_on_all_ranks(
    choose: Callable[[], _Choices], axes: Sequence[dist.ProcessGroup | None], inputs: str
) -> _Choices:
    """What `choose` returns, if it does so on all ranks, and with the same result."""
    problem: Exception | None = None
    try:
        chosen = choose()
        found = [target.name for target in chosen.targets], chosen.providers, chosen.degrees, chosen.config, inputs
        said = ", ".join(map(str, (*found, chosen.timeout)))
        digest = hashlib.sha256(repr(sorted(chosen.facts.items())).encode()).hexdigest()
    except Exception as error:  # of any kind: the others must not wait for this rank
        problem, said, digest = error, f"{type(error).__name__}: {error}", ""
    answers = everyone((dist.get_rank(), problem is None, said, digest), axes)
    if problem is not None:
        raise problem
    for rank, succeeded, answer, _ in answers:
        if not succeeded:
            raise AttentionProviderError(f"context parallelism cannot be enabled on rank {rank}: {answer}")
    if len({answer for _, _, answer, _ in answers}) > 1:
        listed = "; ".join(f"rank {rank}: {answer}" for rank, _, answer, _ in answers)
        raise AttentionProviderError(
            f"ranks that are to share a sequence enable context parallelism in different ways. {listed}. Give the same "
            "arguments and the same models on all of them."
        )
    if len({digest for *_, digest in answers}) > 1:
        lines = differences(everyone((dist.get_rank(), chosen.facts), axes))
        more = f". And {len(lines) - 8} more" if len(lines) > 8 else ""
        raise AttentionProviderError(
            f"ranks that are to share a sequence are not alike. {'. '.join(lines[:8])}{more}. Load the same model with "
            "the same adapters, and use the same plan, provider and versions on all of them."
        )
    return chosen


def _dims(mesh: DeviceMesh) -> list[int]:
    """The dimensions of a mesh, the ring's first, as shards are counted."""
    names = mesh.mesh_dim_names or ()
    return [names.index(axis) for axis in AXES] if mesh.ndim == 2 else [0]


def _request(provider: str | AttentionProvider | None, options: dict[str, object], device: str) -> DispatchProcessor:
    """What attention is bound to, where it is to be bound."""
    if provider is None:
        if options:
            raise AttentionProviderError(
                f"{', '.join(f'{name}={value!r}' for name, value in options.items())} is neither an argument of "
                "enable_context_parallel nor, since none is named, an option of a provider. Name the provider whose "
                "option it is: provider='flash'."
            )
        return DispatchProcessor("auto" if device == "cuda" else "native")
    request = DispatchProcessor(provider, **options)
    name = request.choice.provider if request.choice else "auto"
    if name != "auto" and device not in SPECS[name].capabilities.devices:
        raise AttentionProviderError(
            f"attention provider '{name}' runs on {', '.join(sorted(SPECS[name].capabilities.devices))}, and the model "
            f"is on {device}. Move the model there before this call, or name another provider."
        )
    return request


def _provider_names(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> list[str]:
    """To whom attention of these models will go; "scope" to whoever is active."""
    choices = _choices(targets, request, rebind)
    return sorted({"scope" if choice is None else choice.provider for choice in choices})


def _options_by_place(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> list[str]:
    """Options of these providers that count positions of a sequence, which a ring gives to no kernel whole."""
    choices = [choice for choice in _choices(targets, request, rebind) if choice is not None]
    return sorted({each for choice in choices for each in options_by_place(choice.provider, choice.options)})


def _choices(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> set[ProviderChoice | None]:
    """Of these models' attention, as it will be."""
    processors = [module.processor for target in targets for _, module in attention_modules_of(target.model)]
    return {each.choice if isinstance(each, BoundProcessor) and not rebind else request.choice for each in processors}


def _lacking_lse(names: Sequence[str]) -> list[str]:
    """Those that cannot take part in a ring. "auto" takes only who can; of "scope" nothing is known before a call."""
    return [name for name in names if name in SPECS and not SPECS[name].capabilities.lse]


def _topology(
    targets: Sequence[Target],
    names: Sequence[str],
    device: str,
    sharing: ContextParallelMesh | None,
    rotate_method: str | None,
    by_place: Sequence[str],
) -> Topology:
    per_node = job.ranks_per_node()
    return Topology(
        ranks=dist.get_world_size() if sharing is None else sharing.size,
        device_type=device,
        heads=tuple(sorted({heads for target in targets for heads in split_heads(target)})),
        ranks_per_node=per_node,
        peer_access=job.peer_access(device),
        lse=not _lacking_lse(names),
        by_place=bool(by_place),
        rotate_method=rotate_method,
    )


def _degrees(
    topology: Topology,
    names: Sequence[str],
    sharing: ContextParallelMesh | None,
    ulysses_degree: int | None,
    ring_degree: int | None,
    by_place: Sequence[str],
) -> Degrees:
    """As the mesh says, as asked for, or chosen."""
    for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
        if degree is not None:
            ContextParallelConfig(**{name: degree})  # type: ignore[arg-type]  # raises where it is no degree
    if sharing is not None:
        if sharing.size == 1:
            raise AttentionProviderError(
                f"the mesh has one rank, which has nobody to share a sequence with. {job.HOW_TO_LAUNCH}, or make the "
                "mesh's dimension for context parallelism larger."
            )
        for name, asked, has in (
            ("ulysses_degree", ulysses_degree, sharing.ulysses.size),
            ("ring_degree", ring_degree, sharing.ring.size),
        ):
            if asked not in (None, has):
                raise AttentionProviderError(
                    f"{name}={asked}, and the mesh has {has}. Leave it out, or give another mesh: one dimension is a "
                    'ring (or Ulysses, if it is named "ulysses"), two are named "ring" and "ulysses".'
                )
        ulysses_degree, ring_degree = sharing.ulysses.size, sharing.ring.size
    degrees = complete_degrees(topology, ulysses_degree, ring_degree)
    lacking = _lacking_lse(names)
    if degrees.ring_degree > 1 and lacking:
        able = ", ".join(name for name, spec in SPECS.items() if spec.capabilities.lse)
        raise AttentionProviderError(
            f"attention provider {', '.join(map(repr, lacking))} gives no log-sum-exp, without which partial results "
            f"over a ring (ring_degree={degrees.ring_degree}) cannot merge. Set "
            f"ulysses_degree={topology.ranks}, ring_degree=1, which takes any provider, or one of: {able}."
        )
    if degrees.ring_degree > 1 and by_place:
        raise AttentionProviderError(
            f"{', '.join(by_place)} counts positions of the whole sequence, of which a ring (ring_degree="
            f"{degrees.ring_degree}) gives a kernel parts. Set ulysses_degree={topology.ranks}, ring_degree=1, or "
            "leave the option out."
        )
    return degrees if sharing is None else degrees._replace(reason="as the mesh says")


def _config(degrees: Degrees, convert_to_fp32: bool) -> ContextParallelConfig:
    if degrees.ring_degree == 1 and convert_to_fp32 is not True:
        raise AttentionProviderError(
            f"convert_to_fp32={convert_to_fp32!r} says how partial results of a ring merge, and there is no ring "
            f"(ulysses_degree={degrees.ulysses_degree}, ring_degree=1). Leave it out, or set ring_degree."
        )
    return ContextParallelConfig(
        degrees.ring_degree, degrees.ulysses_degree, degrees.rotate_method or "allgather", convert_to_fp32
    )


def _put_on(
    target: Target,
    sharing: ContextParallelMesh,
    lease: shared_groups.Lease,
    inputs: str,
    timeout: datetime.timedelta,
    request: DispatchProcessor,
    rebind: bool,
) -> None:
    """Changes one model. Every step is noted when it is taken, so that `_take_off` undoes what there is."""
    install()  # also where nothing is bound: a model that is split refuses enable_parallelism
    model = target.model
    enabled = _enabled[model] = _Enabled([], [lease.again()], [], [])
    apply_context_parallel(model, sharing, target.plan)
    if inputs != "trust":
        links = Links.of(sharing, timeout)
        enabled.leases.append(links.lease)
        hook = InputSync(model, links, inputs, _caches(target.plan), target.name)
        enabled.forwards.append(hook.forwards)
        enabled.hooks.append(model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
    else:
        enabled.forwards.append(Forwards(model, target.name))
        enabled.hooks.append(model.register_forward_pre_hook(NoteForward(enabled.forwards[0]), prepend=True))
    for _, module in attention_modules_of(model):
        processor = module.processor
        if obstacle(processor) is None and (rebind or not isinstance(processor, BoundProcessor)):
            enabled.processors.append((weakref.ref(module), processor))
            module.set_processor(request)
            copies.change_copies(
                module, functools.partial(change_processor, change=functools.partial(_as_before, before=processor))
            )


def _caches(plan: Plan) -> list[str]:
    """The model's arguments that a plan calls caches."""
    of_model = [spec for path, spec in entries(plan) if not path and isinstance(spec, Mapping)]
    named = [(key, word) for spec in of_model for key, word in spec.items() if isinstance(word, CPCache)]
    names = [key.name if isinstance(key, ParamId) else key for key, _ in named]
    return [name for name in names if isinstance(name, str)]


def _take_off(model: nn.Module) -> None:
    copies.check_not_shallow(model)
    enabled = _enabled.get(model)
    if enabled is None:
        return
    one_thread.check_idle([*names_of_groups(model), *(name for lease in enabled.leases for name in lease.names)], model)
    del _enabled[model]
    for forwards in enabled.forwards:
        rank_progress.note(f"disable_context_parallel, after {forwards.latest()}")
    for reference, before in enabled.processors:
        module: Any = reference()
        if module is not None:
            module.set_processor(_as_before(module.processor, before) if is_noted(module) else before)
    for hook in enabled.hooks:
        hook.remove()
    remove_context_parallel(model)
    for reference, _ in enabled.processors:
        module = reference()
        if module is not None:
            copies.keep_hooks(module)
    recorded = getattr(vars(model).get("forward"), "forget", None)
    if recorded is not None:  # NCCL would not end a group that a CUDA graph still uses
        recorded()
    for lease in enabled.leases:
        lease.close()


def _as_before(now: Any, before: Any) -> Any:
    """The processor to put back: `before`, unless diffusers put another kind in its place meanwhile (fused projections,
    IP-Adapters): then that kind, bound as `before` is. Such a kind is bound; what a user puts in place is not."""
    by_diffusers = isinstance(now, BoundProcessor) or type(now).__module__.startswith("diffusers.")
    if unbind(now) is unbind(before) or not by_diffusers:
        return before
    return bind(now, before.choice) if isinstance(before, BoundProcessor) else unbind(now)
