"""Which degrees are chosen, and which are refused."""

import dataclasses

import pytest

from diffusers_attn import AttentionProviderError
from diffusers_attn.parallelize.cost import Workload
from diffusers_attn.parallelize.degrees import (
    RULES,
    Topology,
    choose_degrees,
    complete_degrees,
    predictions,
    required_degrees,
)
from diffusers_attn.parallelize.workload import attention_flops
from diffusers_attn.providers.hardware import NETWORK, TYPICAL, Hardware

NVLINK, PCIE, HOST, CPU = (TYPICAL[name] for name in ("nvlink", "pcie", "host memory", "cpu"))


def flux(hardware: Hardware) -> tuple[Workload, ...]:
    """1024 x 1024: 19 double and 38 single blocks."""
    flops = attention_flops(["native"], (9, 0) if hardware is NVLINK else None, 128, 4608, hardware)
    of_block = Workload(4608, 24, 24, 128, 19, flops, 2, 3072**2)
    return of_block, of_block._replace(layers=38, weights_overlapped=5 * 3072**2)


def wan(hardware: Hardware, heads: int = 12, layers: int = 30, tokens: int = 32760) -> tuple[Workload, ...]:
    """1.3B at 480p, 81 frames."""
    flops = attention_flops(["native"], (9, 0) if hardware is NVLINK else None, 128, tokens, hardware)
    return (Workload(tokens, heads, heads, 128, layers, flops, 2, (128 * heads) ** 2),)


def job(ranks, hardware, works=flux, heads=(24,), per_node=None, **more):
    between = NETWORK if per_node and per_node < ranks else None
    device = "cpu" if hardware is CPU else "cuda"
    return Topology(
        ranks, device, heads, per_node, works=works(hardware), hardware=hardware._replace(between=between), **more
    )


# (ulysses_degree, ring_degree, rotate_method), and a part of the reason.
PREDICTED = "predicted at"
CHOSEN = {
    "two GPUs": (job(2, NVLINK), (1, 2, "allgather"), PREDICTED),
    "two GPUs, Wan": (job(2, NVLINK, wan, (12,)), (1, 2, "allgather"), PREDICTED),
    "two GPUs, uneven heads": (job(2, NVLINK, heads=(5,)), (1, 2, "allgather"), "keys and values travel"),
    "four GPUs": (job(4, NVLINK), (1, 4, "allgather"), "predicted at 4,608 tokens: "),
    "four GPUs, Wan": (job(4, NVLINK, wan, (12,)), (1, 4, "allgather"), "predicted at 32,760 tokens: "),
    "four GPUs without NVLink": (job(4, PCIE), (4, 1, None), PREDICTED),
    "four GPUs without NVLink, Wan": (job(4, PCIE, wan, (12,)), (1, 4, "alltoall"), PREDICTED),
    "no peer access": (job(4, HOST), (4, 1, None), PREDICTED),
    "eight GPUs": (job(8, NVLINK), (8, 1, None), PREDICTED),
    "eight GPUs, Wan, whose heads do not divide": (job(8, NVLINK, wan, (12,)), (2, 4, "allgather"), PREDICTED),
    "four GPUs, one of two models uneven": (job(4, NVLINK, heads=(24, 30)), (1, 4, "allgather"), PREDICTED),
    "two GPUs that send through the host": (job(2, HOST), (1, 2, "allgather"), PREDICTED),
    "no peer access, uneven": (job(2, HOST, heads=(5,)), (1, 2, "allgather"), "keys and values travel"),
    "two nodes": (job(8, NVLINK, per_node=4), (4, 2, "alltoall"), "Ulysses over 2 within"),
    "two nodes, Wan": (job(8, NVLINK, wan, (12,), 4), (4, 2, "alltoall"), PREDICTED),
    "two nodes, a method": (job(8, NVLINK, per_node=4, rotate_method="allgather"), (4, 2, "allgather"), PREDICTED),
    "a part of a node": (job(2, NVLINK, per_node=4), (1, 2, "allgather"), PREDICTED),
    "one GPU a node": (job(2, NVLINK, per_node=1), (1, 2, "alltoall"), "keys and values travel"),
    "CPUs": (job(4, CPU, heads=(8, 12)), (4, 1, None), PREDICTED),
    "two CPUs": (job(2, CPU, wan, (12,)), (2, 1, None), PREDICTED),
    "CPUs, uneven": (job(3, CPU, heads=(4,)), (1, 3, "allgather"), PREDICTED),
    "no log-sum-exp": (job(2, NVLINK, heads=(5,), lse=False), (2, 1, None), "log-sum-exp"),
    "positions of the whole": (job(2, NVLINK, heads=(5,), by_place=True), (2, 1, None), "counts positions"),
    "no log-sum-exp, two nodes": (job(8, NVLINK, per_node=4, lse=False), (8, 1, None), "log-sum-exp"),
    "a method": (job(2, CPU, heads=(4,), rotate_method="alltoall"), (1, 2, "alltoall"), "rotate_method"),
    "no attention that is split": (Topology(4, "cuda"), (4, 1, None), "no attention is split"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_chosen(case):
    topology, expected, reason = CHOSEN[case]
    found = choose_degrees(topology)
    assert found[:3] == expected and reason in found.reason
    assert found.ulysses_degree * found.ring_degree == topology.ranks
    assert complete_degrees(topology, None, None) == found


def test_every_rule_is_needed():
    required = {found.reason for topology, _, _ in CHOSEN.values() if (found := required_degrees(topology))}
    assert {rule.reason for rule in RULES} < required


def test_the_reason_names_the_prediction_the_second_best_and_the_tokens():
    found = choose_degrees(dataclasses.replace(job(4, NVLINK), hardware_source="links: 1 GB/s"))
    (best, shortest), (second, longer), *_ = predictions(job(4, NVLINK))
    assert found.reason == (
        f"predicted at 4,608 tokens: {shortest * 1e3:.3g} ms of attention and exchanges per step, "
        f"{longer * 1e3:.3g} ms with {second}; links: 1 GB/s"
    )
    assert str(best) == "a gather of 4"


def test_two_models_are_predicted_together():
    """The larger one decides, and the report names the tokens of both."""
    both = dataclasses.replace(job(4, PCIE), works=flux(PCIE) + wan(PCIE))
    found = choose_degrees(both)
    assert found[:3] == (1, 4, "alltoall") and "at 4,608 and 32,760 tokens" in found.reason


def test_ulysses_stays_in_a_node_and_needs_heads_that_divide():
    possible = {each for each, _ in predictions(job(8, NVLINK, heads=(6,), per_node=4))}
    assert {each.ulysses_degree for each in possible} == {1, 2}  # of the divisors of 4, 6 heads divide by 1 and 2
    assert {each.ring_degree for each in possible} == {8, 4}


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
