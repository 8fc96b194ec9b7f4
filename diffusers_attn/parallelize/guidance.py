"""Divides the guidance of a pipeline among groups of ranks, when context parallelism is enabled."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..context_parallel.comm import rank_progress, shared_groups
from ..context_parallel.mesh import ContextParallelMesh
from ..cp_plans.advanced import CPCache, CPStore
from ..cp_plans.plan import Plan, entries
from ..errors import AttentionProviderError
from ..guidance.batched import divides_batch
from ..guidance.division import Divider
from ..guidance.groups import Groups
from ..guidance.guided_call import GuidedCall
from ..guidance.inputs import StepInputs
from ..guidance.installed import install
from .decide import decide_degrees
from .degrees import Degrees, Topology, complete_degrees
from .input_exchange import Links
from .input_sync import InputSync
from .targets import Target


class Guidance(NamedTuple):
    """How branches of guidance, and the samples of a batch, are divided."""

    degree: int | None
    """Number of groups of ranks for branches; None: as many as divide the branches."""
    data_degree: int | None
    """Number of parts of a batch; None: those groups divide samples as well."""
    degrees: dict[int, Degrees]
    """For each possible number of groups, how the ranks of one group split a sequence."""

    def __str__(self) -> str:
        number = "groups" if self.degree is None else f"{self.degree} groups"
        if self.data_degree is None:
            divided = f"branches of guidance and samples of a batch by {number} of ranks"
        else:
            divided = f"samples of a batch by {self.data_degree} groups of ranks"
            divided += "" if self.degree == 1 else f" and branches of guidance by {number} of each"
        product = None if self.degree is None else self.degree * (self.data_degree or 1)
        splits = [each for count, each in self.degrees.items() if product in (None, count)]
        within = {text: None for text in map(_in_words, splits) if text}
        return f"{divided}{', each with ' * bool(within)}{' or '.join(within)}"


def _in_words(degrees: Degrees) -> str:
    if degrees.ulysses_degree == degrees.ring_degree == 1:
        return ""
    parts = [f"Ulysses over {degrees.ulysses_degree}"] if degrees.ulysses_degree > 1 else []
    parts += [f"a ring of {degrees.ring_degree}"] if degrees.ring_degree > 1 else []
    return " and ".join(parts)


def check_degrees(guidance_degree: object, data_degree: object, ranks: int, has_mesh: bool) -> None:
    """Checks a user's `guidance_degree` and `data_degree`.

    Raises:
        AttentionProviderError: they are not accepted.
    """
    accepted = [number for number in range(1, ranks + 1) if ranks % number == 0]
    product = 1
    for name, degree, default in (
        ("guidance_degree", guidance_degree, "as many as there are branches of guidance"),
        ("data_degree", data_degree, "as many as divide the batch evenly"),
    ):
        if degree is None:
            continue
        if type(degree) is not int or degree < 1 or ranks % degree:
            raise AttentionProviderError(
                f"{name}={degree!r}: the number of groups of ranks must divide the {ranks} ranks; accepted are "
                f"{', '.join(map(str, accepted))}, and None for {default}."
            )
        if degree > 1 and has_mesh:
            raise AttentionProviderError(
                f"{name}={degree} divides all ranks of the job, and mesh=... names some. Leave out one of them, or "
                f"give a mesh of all ranks with a dimension '{name.removesuffix('_degree')}'."
            )
        product *= degree
    if ranks % product:
        raise AttentionProviderError(
            f"guidance_degree={guidance_degree} and data_degree={data_degree} make {product} groups, but their number "
            f"must divide the {ranks} ranks; accepted are {', '.join(map(str, accepted))} groups."
        )


def choose_guidance(
    degree: int | None,
    data_degree: int | None,
    by_itself: bool,
    topology: Topology,
    targets: Sequence[Target],
    providers: Sequence[str],
    ulysses_degree: int | None,
    ring_degree: int | None,
    inputs: str,
) -> Guidance | None:
    """How to divide guidance and batches; None: all ranks split the sequence of every call. All ranks must call this.

    Args:
        degree: number of groups for branches that the user asked for.
        data_degree: number of parts of a batch that the user asked for.
        by_itself: whether guidance is divided if the user named no number.
        topology: all ranks.
        targets: the models to split.
        providers: names of the attention providers in use.
        ulysses_degree, ring_degree: what the user asked for within a group, if one of the degrees is above 1.
        inputs: "broadcast", "check" or "trust".

    Raises:
        AttentionProviderError: the degrees do not fit the ranks of a group, or a model cannot divide its calls.
    """
    if degree is None and not by_itself:
        degree = 1
    asked = {"guidance_degree": degree or 1, "data_degree": data_degree or 1}
    if degree == 1 and asked["data_degree"] == 1:
        return None
    for argument, number in asked.items():
        for target in targets if number > 1 else ():
            reason = obstacle(target, inputs)
            if reason is None and argument == "data_degree" and not divides_batch(target.model):
                reason = "its samples influence each other. Give each group of ranks a prompt of its own (mesh=...)"
            if reason is not None:
                raise AttentionProviderError(
                    f"{argument}={number}: every rank must make all calls of {target.name}, because {reason}, or leave "
                    f"{argument} out."
                )
    if all(obstacle(target, inputs) is not None for target in targets):
        return None
    named = math.prod(asked.values())
    counts = [n for n in range(2, topology.ranks + 1) if topology.ranks % n == 0]
    if degree is not None:
        counts = [n for n in counts if n in (*asked.values(), named)]
    found: dict[int, Degrees] = {}
    for count in counts:
        ranks = topology.ranks // count
        group = dataclasses.replace(topology, ranks=ranks, rotate_method=topology.rotate_method if ranks > 1 else None)
        within = (ulysses_degree, ring_degree) if count == named else (None, None)
        if ranks == 1:
            _check_alone(asked, *within)
            found[count] = Degrees(1, 1, None, "one rank")
        elif within == (None, None):
            found[count] = decide_degrees(group, targets, providers)
        else:
            found[count] = complete_degrees(group, *within)
    return Guidance(degree, data_degree, found)


def _check_alone(asked: Mapping[str, int], ulysses_degree: int | None, ring_degree: int | None) -> None:
    if (ulysses_degree or 1) * (ring_degree or 1) != 1:
        given = " and ".join(f"{name}={number}" for name, number in asked.items() if number > 1)
        raise AttentionProviderError(
            f"{given} leaves one rank in each group, so that ulysses_degree={ulysses_degree} and "
            f"ring_degree={ring_degree} have no ranks. Leave them out, or use more ranks."
        )


def obstacle(target: Target, inputs: str) -> str | None:
    """Why every rank must make all calls of this model, and what to do, as a clause; None if they can be divided."""
    if keeps_keys(target.plan):
        return "it keeps keys from one call to the next. Use another model"
    if inputs == "check":
        return "inputs='check' compares the values of every call before it. Use inputs='broadcast'"
    return None


def keeps_keys(plan: Plan) -> bool:
    """Whether a plan has words for keys that stay from one forward to the next."""
    specs = [spec for _, spec in entries(plan)]
    words = [word for spec in specs if isinstance(spec, Mapping) for word in spec.values()]
    return any(isinstance(each, (CPCache, CPStore)) for each in (*specs, *words))


def attach_guidance(
    target: Target,
    guidance: Guidance,
    everyone: ContextParallelMesh,
    hook: InputSync | None,
    leases: list[shared_groups.Lease],
    timeout: Any,
    pipeline: Callable[[], Any],
) -> None:
    """Replaces the call of a split model.

    Args:
        target: the model.
        guidance: how to divide its calls.
        everyone: all ranks.
        hook: keeps the model's inputs equal; None if they are trusted to be.
        leases: receives the leases of groups that are made later.
        timeout: how long exchanges wait.
        pipeline: returns the pipeline of the model, or None.
    """
    model = target.model
    reference: weakref.ref[nn.Module] = weakref.ref(model)
    divide = functools.partial(_divide, guidance=guidance, everyone=everyone, timeout=timeout, leases=leases)
    name, caches = target.name, () if hook is None else tuple(hook.caches)
    mode = "trust" if hook is None else hook.mode

    def within(groups: Groups) -> InputSync | None:
        existing = reference()
        if groups.mesh.size == 1 or existing is None:
            return None
        links = Links.of(groups.mesh, timeout)
        leases.append(links.lease)
        return InputSync(existing, links, mode, caches, name)

    call = GuidedCall(
        model,
        StepInputs(reference, hook, within),
        Divider(everyone.size, guidance.degree, guidance.data_degree),
        divide,
        lambda: _guides(pipeline()),
        divides_batch(model),
    )
    install(model, model if target.called is None else target.called, call)


def _guides(pipeline: Any) -> bool:
    """Whether a pipeline says that its running call uses guidance."""
    try:
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))
    except TypeError:  # computed from a scale that is not set
        return False


def _divide(
    count: int,
    guidance: Guidance,
    everyone: ContextParallelMesh,
    timeout: Any,
    leases: list[shared_groups.Lease],
) -> Groups:
    """Makes the groups of ranks. All ranks must call this."""
    degrees = guidance.degrees[count]
    size = everyone.size // count
    mesh = ContextParallelMesh.from_degrees(
        degrees.ring_degree,
        degrees.ulysses_degree,
        device_type=everyone.device_type,
        rotate_method=degrees.rotate_method or "allgather",
        convert_to_fp32=everyone.config.convert_to_fp32,
        timeout=timeout,
    )
    if mesh.lease is not None:
        leases.append(mesh.lease)
    first = dist.get_rank() // size * size
    names = [group.name for group in (mesh.ring, mesh.ulysses) if group.size > 1]
    rank_progress.belongs_to(names, range(first, first + size))
    mesh = dataclasses.replace(mesh, lease=None, device_type=everyone.device_type)
    return Groups(count, mesh, everyone, tuple(range(dist.get_world_size())))
