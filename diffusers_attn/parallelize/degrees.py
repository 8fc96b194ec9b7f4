"""Chooses Ulysses and ring degrees when the user names none.

What a provider, an option or the user requires is a table of rules. Among the strategies that remain, the one with the
shortest predicted time is chosen (`cost.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import AttentionProviderError
from ..providers.hardware import KINDS, TYPICAL, Hardware
from .cost import Strategy, Workload, step_seconds


@dataclasses.dataclass(frozen=True)
class Topology:
    """The properties of a job that decide its degrees. Equal on every rank."""

    ranks: int
    """Number of ranks that share a sequence, two or more."""
    device_type: str
    """Device type of the ranks, such as "cuda"."""
    heads: tuple[int, ...] = ()
    """Distinct numbers of heads of the attention that is split; with grouped heads, numbers of key heads."""
    ranks_per_node: int | None = None
    """Number of ranks in each node. None: all ranks are in one node."""
    lse: bool = True
    """Whether every provider in use returns the log-sum-exp, and in training has a backward of partial results."""
    by_place: bool = False
    """Whether an option of a provider counts positions of the full sequence."""
    rotate_method: str | None = None
    """The rotate_method that the user gave; None if none was given."""
    works: tuple[Workload, ...] = ()
    """The attention that is split."""
    hardware: Hardware = TYPICAL["cpu"]
    """Speeds of the devices and links."""
    hardware_source: str = "speeds are typical ones"
    """Where `hardware` comes from, for the report."""

    @property
    def nodes(self) -> int:
        """Number of nodes; 1 if the ranks do not fill complete nodes."""
        return self.ranks // self.per_node

    @property
    def per_node(self) -> int:
        """Number of neighbouring ranks that are in one node."""
        per_node = self.ranks_per_node or self.ranks
        return per_node if self.ranks % per_node == 0 else self.ranks


class Degrees(NamedTuple):
    """The chosen degrees, with the reason."""

    ulysses_degree: int
    ring_degree: int
    rotate_method: str | None
    """How keys and values travel in the ring; None without a ring."""
    reason: str


class _Rule(NamedTuple):
    applies: Callable[[Topology], bool]
    ring: bool
    """Whether all ranks form a ring; otherwise they use Ulysses."""
    reason: str


RULES = (
    _Rule(
        lambda job: not job.lse and job.rotate_method is None,
        False,
        "the provider gives no log-sum-exp, and only Ulysses does without",
    ),
    _Rule(
        lambda job: job.by_place and job.rotate_method is None,
        False,
        "an option of the provider counts positions of the full sequence, which only Ulysses gives a kernel",
    ),
    _Rule(
        lambda job: job.rotate_method is not None and job.nodes == 1,
        True,
        "a rotate_method was asked for, so that there is a ring",
    ),
)
"""Cases in which only one strategy is possible. The first one that applies decides."""


def required_degrees(job: Topology) -> Degrees | None:
    """The only possible degrees: those of the first rule in `RULES` that applies, or of the only strategy that is
    left; None if several strategies are possible."""
    rule = next((rule for rule in RULES if rule.applies(job)), None)
    if rule is not None:
        ulysses, ring = (1, job.ranks) if rule.ring else (job.ranks, 1)
        return _with_method(job, ulysses, ring, "allgather", rule.reason)
    only, *others = _possible(job)
    return None if others else Degrees(*only, _WITHOUT_CHOICE)


_WITHOUT_CHOICE = "keys and values travel, since Ulysses needs heads that divide among several ranks of a node"


def choose_degrees(job: Topology) -> Degrees:
    """The degrees for a job whose user named none: the required ones, otherwise those of the strategy with the shortest
    predicted time."""
    required = required_degrees(job)
    if required is not None:
        return required
    predicted = predictions(job)
    return Degrees(*predicted[0][0], _reason(job, predicted))


def predictions(job: Topology) -> list[tuple[Strategy, float]]:
    """Every possible strategy with its predicted seconds per forward (`cost.step_seconds`), the shortest first."""
    kind = KINDS.get(job.device_type, KINDS["cuda"])
    found = [(each, step_seconds(job.works, each, job.hardware, kind, job.per_node)) for each in _possible(job)]
    return sorted(found, key=lambda pair: pair[1])


def _possible(job: Topology) -> list[Strategy]:
    """The strategies that these ranks can use: Ulysses gives every rank the same number of heads, and does not reach
    beyond a node. Strategies with more Ulysses come first: they need less memory than a gather."""
    found = []
    for ulysses in range(job.per_node, 0, -1):
        if job.per_node % ulysses or (ulysses > 1 and any(heads % ulysses for heads in job.heads)):
            continue
        ring = job.ranks // ulysses
        if ring == 1:
            found.append(Strategy(ulysses, 1, None))
            continue
        # Two ranks send the same with both methods. Between nodes, a ring keeps less of it in memory.
        methods = ["alltoall" if job.nodes > 1 else "allgather"] if ring == 2 else ["allgather", "alltoall"]
        methods = methods if job.rotate_method is None else [job.rotate_method]
        found += [Strategy(ulysses, ring, method) for method in methods]
    return found


def _reason(job: Topology, predicted: list[tuple[Strategy, float]]) -> str:
    if not job.works:
        return "no attention is split whose time would differ"
    tokens = " and ".join(f"{each:,}" for each in sorted({work.tokens for work in job.works}))
    (_, shortest), (second, longer), *_ = predicted
    return (
        f"predicted at {tokens} tokens: {_milliseconds(shortest)} of attention and exchanges per step, "
        f"{_milliseconds(longer)} with {second}; {job.hardware_source}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def complete_degrees(job: Topology, ulysses_degree: int | None, ring_degree: int | None) -> Degrees:
    """The degrees for a job whose user named both, one or none.

    Raises:
        AttentionProviderError: the product of the degrees is not the number of ranks, or a rotate_method is given
            without a ring.
    """
    if ulysses_degree is None and ring_degree is None:
        return choose_degrees(job)
    named = math.prod(degree for degree in (ulysses_degree, ring_degree) if degree is not None)
    both = ulysses_degree is not None and ring_degree is not None
    if named < 1 or job.ranks % named or (both and named != job.ranks):
        given = f"ulysses_degree={ulysses_degree}, ring_degree={ring_degree}"
        pairs = ", ".join(f"{n} * {job.ranks // n}" for n in range(1, job.ranks + 1) if job.ranks % n == 0)
        raise AttentionProviderError(
            f"{given} for {job.ranks} ranks: ulysses_degree * ring_degree must be {job.ranks}; accepted are {pairs}, "
            "and None for one that follows. To leave ranks for data parallelism, pass the part of a DeviceMesh that "
            'shares a sequence: mesh=init_device_mesh(device, (data, ring, ulysses), mesh_dim_names=("data", "ring", '
            '"ulysses"))["ring", "ulysses"].'
        )
    ulysses = ulysses_degree if ulysses_degree is not None else job.ranks // named
    ring = ring_degree if ring_degree is not None else job.ranks // named
    method = "alltoall" if job.nodes > 1 and ring > 1 else "allgather"
    reason = "as asked for" if both or named == job.ranks else "as asked for, and the other ranks with it"
    return _with_method(job, ulysses, ring, method, reason)


def _with_method(job: Topology, ulysses: int, ring: int, rotate_method: str, reason: str) -> Degrees:
    """The degrees with a rotate_method. Raises AttentionProviderError if one was asked for without a ring."""
    if ring == 1 and job.rotate_method is not None:
        raise AttentionProviderError(
            f"rotate_method={job.rotate_method!r} says how keys and values travel around a ring, and there is none "
            f"(ulysses_degree={ulysses}, ring_degree=1). Leave it out, or set ring_degree."
        )
    return Degrees(ulysses, ring, None if ring == 1 else job.rotate_method or rotate_method, reason)
