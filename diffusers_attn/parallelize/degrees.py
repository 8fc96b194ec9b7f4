"""Chooses Ulysses and ring degrees when the user names none, by a table of rules. The first that applies decides.

Degrees depend on the `Topology` alone. Statements about speed are measured in docs/context_parallel.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import AttentionProviderError


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
    peer_access: bool = True
    """Whether the devices of a node can read each other's memory."""
    nvlink: bool = False
    """Whether the devices of a node are connected by NVLink."""
    lse: bool = True
    """Whether every provider in use returns the log-sum-exp, and in training has a backward of partial results."""
    by_place: bool = False
    """Whether an option of a provider counts positions of the full sequence."""
    rotate_method: str | None = None
    """The rotate_method that the user gave; None if none was given."""

    @property
    def heads_divide(self) -> bool:
        """Whether Ulysses over all ranks gives every rank the same number of heads."""
        return self._divide(self.ranks)

    def _divide(self, ranks: int) -> bool:
        return all(heads % ranks == 0 for heads in self.heads)

    @property
    def nodes(self) -> int:
        """Number of nodes; 1 if the ranks do not fill complete nodes."""
        per_node = self.ranks_per_node or self.ranks
        return self.ranks // per_node if self.ranks % per_node == 0 else 1


class Degrees(NamedTuple):
    """The chosen degrees, with the reason."""

    ulysses_degree: int
    ring_degree: int
    rotate_method: str | None
    """How keys and values travel in the ring; None without a ring."""
    reason: str


class _Rule(NamedTuple):
    applies: Callable[[Topology], bool]
    ulysses_degree: Callable[[Topology], int]
    """Computes the Ulysses degree; the ring has the remaining factor."""
    rotate_method: str
    """The rotate_method of the ring, if there is one."""
    reason: str


def _all(job: Topology) -> int:
    return job.ranks


def _none(job: Topology) -> int:
    return 1


def _within_nodes(job: Topology) -> int:
    return job.ranks // job.nodes


_MOST_OF_A_GATHER = 4
"""The largest number of devices with NVLink for which a gather was measured, and was faster than Ulysses."""

RULES = (
    _Rule(
        lambda job: not job.lse and job.rotate_method is None,
        _all,
        "allgather",
        "the provider gives no log-sum-exp, and only Ulysses does without",
    ),
    _Rule(
        lambda job: job.by_place and job.rotate_method is None,
        _all,
        "allgather",
        "an option of the provider counts positions of the whole sequence, which only Ulysses gives a kernel",
    ),
    _Rule(
        lambda job: job.nodes > 1,
        _within_nodes,
        "alltoall",
        "the ring, which hides what it sends under attention, goes between the nodes, and Ulysses within them",
    ),
    _Rule(
        lambda job: job.rotate_method is not None,
        _none,
        "allgather",
        "a rotate_method was asked for, so that there is a ring",
    ),
    _Rule(
        lambda job: job.device_type == "cpu" and job.heads_divide,
        _all,
        "allgather",
        "on CPUs nothing hides an exchange, Ulysses sends the fewest bytes, and the heads divide",
    ),
    _Rule(
        lambda job: not job.peer_access and job.heads_divide,
        _all,
        "allgather",
        "the devices do not read each other's memory, Ulysses sends the fewest bytes, and the heads divide",
    ),
    _Rule(
        lambda job: job.ranks > (_MOST_OF_A_GATHER if job.nvlink else 2) and job.heads_divide,
        _all,
        "allgather",
        "among so many devices a gather of all keys does not hide in every model, and the heads divide",
    ),
    _Rule(
        lambda job: job.peer_access and job.ranks <= (_MOST_OF_A_GATHER if job.nvlink else 2),
        _none,
        "allgather",
        "keys and values are gathered from the other devices of the node under the attention to the local ones",
    ),
    _Rule(
        lambda job: True,
        _none,
        "allgather",
        "the heads do not divide among the ranks, so that keys and values travel",
    ),
)


def choose_degrees(job: Topology) -> Degrees:
    """The degrees for a job whose user named none, by the first rule in `RULES` that applies."""
    rule = next(rule for rule in RULES if rule.applies(job))
    ulysses = rule.ulysses_degree(job)
    return _with_method(job, ulysses, job.ranks // ulysses, rule.rotate_method, rule.reason)


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
