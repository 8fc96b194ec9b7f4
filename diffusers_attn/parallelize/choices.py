"""The choices of `enable_context_parallel` on one rank: models, plans, provider and degrees.

Every argument is checked before the first model is changed.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..context_parallel import job
from ..context_parallel.comm import shared_groups
from ..context_parallel.config import ContextParallelConfig
from ..context_parallel.mesh import ContextParallelMesh
from ..cp_plans.plan import Plan
from ..errors import AttentionProviderError
from ..processors.binding import attention_modules_of
from ..processors.bound import BoundProcessor
from ..processors.dispatch import DispatchProcessor
from ..providers import speeds_file
from ..providers.catalog import SPECS, AttentionProvider, options_by_place
from ..runtime.cuda_graphs.apply import CudaGraphs, check_mode
from ..scope import ProviderChoice
from ..vae.split import SplitVae, VaeTarget, find_vaes
from .degrees import Degrees, Topology, complete_degrees, required_degrees
from .guidance import check_degrees
from .input_sync import MODES
from .model_sync import Adapters, described_model, described_plan, versions
from .targets import Target, find_targets, split_heads, unwrapped
from .weights.select import ShardWeights, ToShard, facts_of, models_to_shard


class Choices(NamedTuple):
    """All decisions, before anything changes."""

    targets: list[Target]
    """The models to split."""
    without_plan: list[str]
    """Names of the pipeline's other transformers, which every rank runs in full."""
    request: DispatchProcessor
    """The provider that attention is bound to."""
    rebind: bool
    """Whether attention that is bound already is bound to `request` as well."""
    providers: list[str]
    """Names of the providers that attention will use; "scope" for those of `attention_provider`."""
    topology: Topology
    degrees: Degrees | None
    """None: several degrees are possible, and all ranks decide together (`decide.py`)."""
    convert_to_fp32: bool
    inputs: str
    """"broadcast", "check" or "trust"."""
    cuda_graphs: CudaGraphs
    """See `enable_context_parallel`."""
    split_vae: SplitVae
    """See `enable_context_parallel`."""
    vaes: list[VaeTarget]
    """The VAEs to split."""
    guidance_degree: int | None
    """Number of groups for branches of guidance that the user asked for."""
    data_degree: int | None
    """Number of parts of a batch that the user asked for."""
    timeout: datetime.timedelta
    weights: list[ToShard]
    """The models whose weights are sharded."""
    facts: dict[str, str]
    """Properties that must be equal on all ranks, by name."""


def choose(
    pipeline_or_model: Any,
    device: str,
    sharing: ContextParallelMesh | None,
    *,
    plan: Plan | None,
    ulysses_degree: int | None,
    ring_degree: int | None,
    rotate_method: str | None,
    convert_to_fp32: bool,
    provider: str | AttentionProvider | None,
    provider_options: dict[str, object],
    inputs: str,
    timeout: datetime.timedelta | float | None,
    check_weights: bool,
    cuda_graphs: CudaGraphs,
    split_vae: SplitVae,
    guidance_degree: int | None,
    data_degree: int | None,
    shard_weights: ShardWeights,
) -> Choices:
    """This rank's choices. Changes nothing and exchanges nothing.

    Args:
        pipeline_or_model: see `enable_context_parallel`, like all arguments by name.
        device: device type of the model, such as "cuda".
        sharing: the mesh that the user gave; None for all ranks of the job.

    Raises:
        AttentionProviderError: context parallelism cannot be enabled with these arguments.
    """
    if inputs not in MODES:
        raise AttentionProviderError(f"inputs={inputs!r}: accepted are {', '.join(map(repr, MODES))}.")
    check_mode(cuda_graphs)
    targets, without_plan = find_targets(pipeline_or_model, plan)
    weights = models_to_shard(pipeline_or_model, shard_weights, cuda_graphs)
    rebind = provider is not None
    request = _request(provider, provider_options, device)
    names = _provider_names(targets, request, rebind)
    by_place = _options_by_place(targets, request, rebind)
    topology = _topology(targets, names, device, sharing, rotate_method, by_place)
    check_degrees(guidance_degree, data_degree, topology.ranks, sharing is not None)
    groups = (guidance_degree or 1) * (data_degree or 1)
    if groups > 1:  # then the user's degrees are those of a group
        if groups < topology.ranks:
            group = dataclasses.replace(topology, ranks=topology.ranks // groups)
            _degrees(group, names, None, ulysses_degree, ring_degree, by_place)
        ulysses_degree = ring_degree = None
    degrees = _degrees(topology, names, sharing, ulysses_degree, ring_degree, by_place)
    if degrees is not None:
        config_for(degrees, convert_to_fp32)  # raises for settings that it does not accept
    return Choices(
        targets,
        without_plan,
        request,
        rebind,
        names,
        topology,
        degrees,
        convert_to_fp32,
        inputs,
        cuda_graphs,
        split_vae,
        find_vaes(_components(pipeline_or_model), split_vae),
        guidance_degree,
        data_degree,
        shared_groups.as_timeout(timeout, device),
        weights,
        _facts(targets, request, check_weights) | facts_of(weights, check_weights),
    )


def _components(pipeline_or_model: Any) -> dict[str, Any]:
    """The models of a pipeline by name, without wrappers; none for a single model."""
    components = {} if isinstance(pipeline_or_model, nn.Module) else pipeline_or_model.components
    return {name: unwrapped(each) if isinstance(each, nn.Module) else each for name, each in components.items()}


def _facts(targets: Sequence[Target], request: DispatchProcessor, check_weights: bool) -> dict[str, str]:
    facts = versions() | {"provider": repr(request.choice), "check_weights": repr(check_weights)}
    facts["file of measured speeds"] = speeds_file.fingerprint()  # "auto" chooses by it
    for target in targets:
        found = described_plan(target.plan) | Adapters(target.model).describe(in_training=True)
        found |= described_model(target.model, check_weights)
        facts |= {f"{target.name}: {name}": value for name, value in found.items()}
    return facts


def _request(provider: str | AttentionProvider | None, options: dict[str, object], device: str) -> DispatchProcessor:
    """The provider that attention is bound to, with its options checked."""
    if provider is None:
        if options:
            raise AttentionProviderError(
                f"{', '.join(f'{name}={value!r}' for name, value in options.items())} is not an argument of "
                "enable_context_parallel. If it is an option of a provider, name the provider too: provider='flash'."
            )
        return DispatchProcessor("auto" if device == "cuda" else "native")
    request = DispatchProcessor(provider, **options)
    name = request.choice.provider if request.choice else "auto"
    if name != "auto" and device not in SPECS[name].capabilities.devices:
        raise AttentionProviderError(
            f"attention provider '{name}' runs on {', '.join(sorted(SPECS[name].capabilities.devices))}, but the model "
            f"is on {device}. Move the model before this call, or name another provider."
        )
    return request


def _provider_names(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> list[str]:
    """Names of the providers that these models' attention will use; "scope" for those of `attention_provider`."""
    choices = _choices(targets, request, rebind)
    return sorted({"scope" if choice is None else choice.provider for choice in choices})


def _options_by_place(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> list[str]:
    """Options in use that count positions of the full sequence. In a ring, a kernel sees only a part of it."""
    choices = [choice for choice in _choices(targets, request, rebind) if choice is not None]
    return sorted({each for choice in choices for each in options_by_place(choice.provider, choice.options)})


def _choices(targets: Sequence[Target], request: DispatchProcessor, rebind: bool) -> set[ProviderChoice | None]:
    """The provider choices of these models' attention after enabling; None follows the scope."""
    processors = [module.processor for target in targets for _, module in attention_modules_of(target.model)]
    return {each.choice if isinstance(each, BoundProcessor) and not rebind else request.choice for each in processors}


def _lacking_lse(names: Sequence[str]) -> list[str]:
    """Providers without a log-sum-exp, which a ring needs. "auto" takes only providers that have one, and "scope" is
    checked at each call."""
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
) -> Degrees | None:
    """The degrees of the mesh, the given ones, or those that leave no choice; None if there is a choice.

    Raises:
        AttentionProviderError: the degrees contradict the mesh, or the provider does not support them.
    """
    for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
        if degree is not None:
            ContextParallelConfig(**{name: degree})  # type: ignore[arg-type]  # raises for an invalid degree
    if sharing is not None:
        if sharing.size == 1:
            raise AttentionProviderError(
                f"the mesh has one rank, but context parallelism needs at least two. {job.HOW_TO_LAUNCH}, or make the "
                "mesh's dimension for context parallelism larger."
            )
        for name, asked, has in (
            ("ulysses_degree", ulysses_degree, sharing.ulysses.size),
            ("ring_degree", ring_degree, sharing.ring.size),
        ):
            if asked not in (None, has):
                raise AttentionProviderError(
                    f"{name}={asked}, but the mesh has {has}. Leave it out, or give another mesh: one dimension is a "
                    'ring (or Ulysses, if it is named "ulysses"), two must be named "ring" and "ulysses".'
                )
        ulysses_degree, ring_degree = sharing.ulysses.size, sharing.ring.size
    unnamed = ulysses_degree is None and ring_degree is None
    degrees = required_degrees(topology) if unnamed else complete_degrees(topology, ulysses_degree, ring_degree)
    ring = topology.nodes if degrees is None else degrees.ring_degree  # what is chosen later goes between all nodes
    lacking = _lacking_lse(names)
    if ring > 1 and lacking:
        with_lse = ", ".join(name for name, spec in SPECS.items() if spec.capabilities.lse)
        raise AttentionProviderError(
            f"attention provider {', '.join(map(repr, lacking))} returns no log-sum-exp (lse), which a ring "
            f"(ring_degree={ring}) needs to merge partial results. Set ulysses_degree="
            f"{topology.ranks}, ring_degree=1, which works with any provider, or use one of: {with_lse}."
        )
    if ring > 1 and by_place:
        raise AttentionProviderError(
            f"{', '.join(by_place)} counts positions in the full sequence, but in a ring (ring_degree="
            f"{ring}) a kernel sees only parts of it. Set ulysses_degree={topology.ranks}, "
            "ring_degree=1, or leave the option out."
        )
    return degrees if sharing is None or degrees is None else degrees._replace(reason="given by the mesh")


def config_for(degrees: Degrees, convert_to_fp32: bool) -> ContextParallelConfig:
    """The settings of context parallelism.

    Raises:
        AttentionProviderError: a setting is not accepted, or does not apply to these degrees.
    """
    if degrees.ring_degree == 1 and convert_to_fp32 is not True:
        raise AttentionProviderError(
            f"convert_to_fp32={convert_to_fp32!r} applies to a ring, but there is none (ulysses_degree="
            f"{degrees.ulysses_degree}, ring_degree=1). Leave it out, or set ring_degree."
        )
    return ContextParallelConfig(
        degrees.ring_degree, degrees.ulysses_degree, degrees.rotate_method or "allgather", convert_to_fp32
    )
