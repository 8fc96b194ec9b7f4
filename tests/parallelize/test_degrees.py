"""Which degrees are chosen, and which are refused."""

import pytest

from diffusers_attn import AttentionProviderError
from diffusers_attn.parallelize.degrees import RULES, Topology, choose_degrees, complete_degrees

# (ulysses_degree, ring_degree, rotate_method), and a part of the reason.
CHOSEN = {
    "two GPUs": (Topology(2, "cuda", (24,)), (1, 2, "allgather"), "are gathered from"),
    "two GPUs, uneven heads": (Topology(2, "cuda", (5,)), (1, 2, "allgather"), "are gathered from"),
    "four GPUs": (Topology(4, "cuda", (24,), nvlink=True), (1, 4, "allgather"), "are gathered from"),
    "four GPUs without NVLink": (Topology(4, "cuda", (24,)), (4, 1, None), "among so many devices"),
    "eight GPUs": (Topology(8, "cuda", (24,), nvlink=True), (8, 1, None), "among so many devices"),
    "four GPUs, one of two models uneven": (Topology(4, "cuda", (24, 30)), (1, 4, "allgather"), "do not divide"),
    "no peer access": (Topology(2, "cuda", (24,), peer_access=False), (2, 1, None), "the fewest bytes"),
    "no peer access, uneven": (Topology(2, "cuda", (5,), peer_access=False), (1, 2, "allgather"), "do not divide"),
    "two nodes": (Topology(8, "cuda", (24,), ranks_per_node=4), (4, 2, "alltoall"), "between the nodes"),
    "two nodes, a method": (
        Topology(8, "cuda", (24,), ranks_per_node=4, rotate_method="allgather"), (4, 2, "allgather"), "between the"
    ),
    "a part of a node": (Topology(2, "cuda", (24,), ranks_per_node=4), (1, 2, "allgather"), "are gathered from"),
    "one GPU a node": (Topology(2, "cuda", (24,), ranks_per_node=1), (1, 2, "alltoall"), "between the nodes"),
    "CPUs": (Topology(4, "cpu", (8, 12), peer_access=False), (4, 1, None), "on CPUs"),
    "CPUs, uneven": (Topology(3, "cpu", (4,), peer_access=False), (1, 3, "allgather"), "do not divide"),
    "no log-sum-exp": (Topology(2, "cuda", (5,), lse=False), (2, 1, None), "log-sum-exp"),
    "positions of the whole": (Topology(2, "cuda", (5,), by_place=True), (2, 1, None), "counts positions"),
    "no log-sum-exp, two nodes": (Topology(8, "cuda", (24,), 4, lse=False), (8, 1, None), "log-sum-exp"),
    "a method": (Topology(2, "cpu", (4,), rotate_method="alltoall"), (1, 2, "alltoall"), "rotate_method"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_chosen(case):
    topology, expected, reason = CHOSEN[case]
    found = choose_degrees(topology)
    assert found[:3] == expected and reason in found.reason
    assert found.ulysses_degree * found.ring_degree == topology.ranks
    assert complete_degrees(topology, None, None) == found


def test_every_rule_is_needed():
    used = {choose_degrees(topology).reason for topology, _, _ in CHOSEN.values()}
    assert used == {rule.reason for rule in RULES}


def test_what_is_named_stays_and_the_rest_follows():
    job = Topology(8, "cuda", (24,))
    assert complete_degrees(job, 2, 4)[:3] == (2, 4, "allgather")
    assert complete_degrees(job, 2, None)[:3] == (2, 4, "allgather")
    assert complete_degrees(job, None, 2)[:3] == (4, 2, "allgather")
    assert complete_degrees(job, None, 1)[:3] == (8, 1, None)
    assert complete_degrees(Topology(8, "cuda", (24,), rotate_method="alltoall"), 4, None)[:3] == (4, 2, "alltoall")


@pytest.mark.parametrize(("ulysses", "ring"), [(3, None), (None, 3), (2, 2), (4, 4), (1, 1), (16, None)])
def test_what_does_not_multiply_to_the_ranks_is_refused(ulysses, ring):
    with pytest.raises(AttentionProviderError, match=r"must be 8; accepted are 1 \* 8, 2 \* 4, 4 \* 2, 8 \* 1"):
        complete_degrees(Topology(8, "cuda", (24,)), ulysses, ring)


def test_a_method_without_a_ring_is_refused():
    job = Topology(2, "cuda", (24,), rotate_method="alltoall")
    with pytest.raises(AttentionProviderError, match="there is none"):
        complete_degrees(job, 2, None)
