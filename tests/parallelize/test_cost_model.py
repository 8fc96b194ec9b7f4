"""The cost model: its predictions against recorded steps, and properties that hold for all sizes and links."""

from __future__ import annotations

import collections
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_attn.parallelize.cost import Strategy, Workload, attention_seconds, layer_seconds, peak_flops
from diffusers_attn.parallelize.typical_tokens import typical_tokens
from diffusers_attn.parallelize.workload import attention_flops, workloads
from diffusers_attn.providers.hardware import KINDS, NETWORK, TYPICAL, Hardware, Link

CUDA, NVLINK = KINDS["cuda"], TYPICAL["nvlink"]


def load_predictions():
    path = Path(__file__).parents[2] / "benchmarks" / "predictions.py"
    spec = importlib.util.spec_from_file_location("predictions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predictions"] = module
    spec.loader.exec_module(module)
    return module


PREDICTIONS = load_predictions()
ROWS = list(PREDICTIONS.rows())


def by_host(row) -> bool:
    """Steps of Flux that are not recorded in a CUDA graph: a busy host takes longer to launch them than the GPU to run
    them. The cost model does not predict the host."""
    return row.model.startswith("Flux") and not row.strategy.endswith("+graph") and row.strategy != "defaults"


def test_every_step_is_predicted_within_ten_percent_but_those_that_wait_for_the_host():
    missed = [row for row in ROWS if abs(row.error) > PREDICTIONS.WITHIN]
    # Recorded on four GPUs before graphs were the default.
    missed = [row for row in missed if (row.run, row.strategy) != ("mechanisms-flux-h200x4", "defaults")]
    assert len(ROWS) > 50 and all(map(by_host, missed)), missed
    assert all(row.predicted < row.measured for row in missed)  # a host can only take longer


def test_single_layers_are_predicted_within_ten_percent_but_one():
    missed = {row[:2] for row in PREDICTIONS.layer_rows() if abs(row[3] / row[2] - 1) > PREDICTIONS.WITHIN}
    assert missed == {("Flux 1024²", "half of the attention")}


def test_the_strategy_that_is_predicted_fastest_is_measured_within_two_percent_of_the_fastest():
    """Of the strategies of one run, each at its fastest, among which degrees are chosen."""
    runs = collections.defaultdict(dict)
    for row in ROWS:
        if not by_host(row) and (row.run, row.strategy) != ("mechanisms-flux-h200x4", "defaults"):
            found = runs[row.run, row.model, row.provider].setdefault(row.degrees, (row.predicted, row.measured))
            runs[row.run, row.model, row.provider][row.degrees] = tuple(map(min, found, (row.predicted, row.measured)))
    compared = {run: found for run, found in runs.items() if len(found) > 1}
    assert len(compared) == 9
    for run, found in compared.items():
        _, measured = min(found.values())
        assert measured <= 1.02 * min(each for _, each in found.values()), run


ranks = st.sampled_from([(1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
methods = st.sampled_from(["allgather", "alltoall"])
links = st.builds(Link, st.floats(1e-7, 1e-2), st.floats(1e7, 1e12))
hardware = st.builds(
    Hardware, st.floats(1e10, 1e16), st.floats(1e9, 1e13), st.integers(1, 200), links, st.none() | links,
    st.none() | links,
)  # fmt: skip
works = st.builds(
    Workload, st.integers(16, 200_000), st.sampled_from([8, 24, 40]), st.just(8), st.sampled_from([64, 128]),
    st.integers(1, 60), st.floats(1e10, 1e15), st.sampled_from([2, 4]), st.integers(0, 10**8),
)  # fmt: skip
kinds = st.sampled_from(list(KINDS.values()))
nodes = st.sampled_from([1, 2, 4, 8])


def seconds(work, degrees, method, on, kind, per_node):
    ulysses, ring = degrees
    return layer_seconds(work, Strategy(ulysses, ring, method if ring > 1 else None), on, kind, per_node)


@settings(max_examples=60, deadline=None)
@given(works, ranks, methods, hardware, kinds, nodes, st.floats(1, 100))
def test_faster_parts_never_make_a_prediction_longer(work, degrees, method, on, kind, per_node, factor):
    usual = seconds(work, degrees, method, on, kind, per_node)
    assert usual > 0

    def faster(link):
        return link and Link(link.seconds / factor, link.bytes_per_second * factor)

    better = [
        on._replace(within=faster(on.within)),
        on._replace(between=faster(on.between)),
        on._replace(copies=faster(on.copies)),
        on._replace(memory_bytes_per_second=on.memory_bytes_per_second * factor),
    ]  # not matrix products, which are no part of the prediction but hide exchanges
    for each in better:
        assert seconds(work, degrees, method, each, kind, per_node) <= usual * (1 + 1e-9)
    quicker = work._replace(flops=work.flops * factor)
    assert seconds(quicker, degrees, method, on, kind, per_node) <= usual * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(works, ranks, methods, hardware, kinds, nodes, st.integers(0, 10_000))
def test_more_tokens_never_take_less_time(work, degrees, method, on, kind, per_node, more):
    work = work._replace(weights_overlapped=0)  # these products are no part of the prediction but hide exchanges
    longer = work._replace(tokens=work.tokens + more)
    assert seconds(longer, degrees, method, on, kind, per_node) >= seconds(
        work, degrees, method, on, kind, per_node
    ) * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(works, ranks, methods, hardware, kinds, nodes)
def test_no_strategy_beats_attention_that_is_split_for_nothing(work, degrees, method, on, kind, per_node):
    ulysses, ring = degrees
    share = 4 * work.heads * work.tokens**2 * work.head_dim / (ulysses * ring)
    assert seconds(work, degrees, method, on, kind, per_node) >= share / work.flops


def test_an_exchange_between_nodes_goes_over_their_link():
    work = Workload(32760, 24, 24, 128, 1, 600e12)
    slow = NVLINK._replace(between=Link(1e-3, 1e9))
    fast = NVLINK._replace(between=Link(1e-6, 1e12))
    for strategy in (Strategy(1, 8, "alltoall"), Strategy(4, 2, "alltoall"), Strategy(1, 8, "allgather")):
        assert layer_seconds(work, strategy, slow, CUDA, 4) > 1.5 * layer_seconds(work, strategy, fast, CUDA, 4)
    inside = Strategy(1, 4, "allgather")  # the ranks of one node
    assert layer_seconds(work, inside, slow, CUDA, 4) == layer_seconds(work, inside, fast, CUDA, 4)
    # Of the eight ranks of two nodes, Ulysses sends four eighths of each tensor to the other node.
    one = 32760 / 8 * 24 * 128 * 2
    sent = layer_seconds(work, Strategy(8, 1, None), NVLINK._replace(between=Link(1e-9, 1e6)), CUDA, 4)
    assert sent == pytest.approx(4 * one / 2 / 1e6, rel=1e-3)


def test_the_messages_of_a_layer():
    """Ulysses sends two where shapes are equal, and else four. Copies of keys and values are two to each other rank."""
    work = Workload(4608, 24, 24, 128, 1, 600e12)
    slow = NVLINK._replace(within=Link(1.0, 1e20), copies=Link(1.0, 1e20))  # a second for each message
    ulysses, gather, ring = Strategy(4, 1, None), Strategy(1, 4, "allgather"), Strategy(1, 4, "alltoall")
    assert round(layer_seconds(work, ulysses, slow, CUDA, 4)) == 2
    assert round(layer_seconds(work, ulysses, slow, CUDA, 4, apart=True)) == 4
    assert round(layer_seconds(work._replace(kv_heads=8), ulysses, slow, CUDA, 4)) == 4
    for strategy in (gather, ring):
        assert round(layer_seconds(work, strategy, slow, CUDA, 4)) == 6
    assert round(layer_seconds(work, gather, slow._replace(copies=None), CUDA, 4)) == 1
    assert round(layer_seconds(work, ring, slow._replace(copies=None), CUDA, 4)) == 3


def test_a_partly_empty_wave_takes_as_long_as_a_full_one():
    """Flux on an H200: 864 tiles are 7 waves on 132 multiprocessors, and half of the queries are 4."""
    work = Workload(4608, 24, 24, 128, 1, 600e12)
    free = CUDA._replace(launch_seconds=0.0)
    full, half = (attention_seconds(work, queries, 4608, 1, NVLINK, free) for queries in (4608, 2304))
    assert half / full == pytest.approx(4 / 7)  # measured: 241.4 of 422.5 us
    assert peak_flops(555, 864, 132) == pytest.approx(555 * 7 * 132 / 864)


def test_the_speed_of_attention():
    of_sm90 = attention_flops(["_native_cudnn"], (9, 0), 128, 32760, NVLINK)
    assert of_sm90 == pytest.approx(557e12 * 24 * 132 / 3072)
    assert attention_flops(["auto"], (9, 0), 128, 32760, NVLINK) == of_sm90
    assert attention_flops(["flash_4"], (9, 0), 128, 32760, NVLINK) > of_sm90
    assert attention_flops(["_native_cudnn", "flash"], (9, 0), 128, 32760, NVLINK) < of_sm90  # the slowest counts
    for providers, capability, head_dim in ((["auto"], (8, 0), 128), (["flash_3"], (9, 0), 128), (["auto"], None, 512)):
        assert attention_flops(providers, capability, head_dim, 4608, NVLINK) == 0.7 * NVLINK.matrix_flops


def test_the_workload_of_a_model():
    import torch

    from diffusers_attn.cp_plans.registry import get_cp_plan
    from diffusers_attn.parallelize.targets import Target
    from tests.zoo import CASES

    model = CASES["flux"].build(dtype=torch.bfloat16).to(torch.bfloat16)
    found = workloads([Target("flux", model, get_cp_plan(model))], ["native"], None, TYPICAL["cpu"])
    width, (double, single) = model.inner_dim, found
    assert double[:5] == (4608, 4, 4, 16, len(model.transformer_blocks))
    assert single[:5] == (4608, 4, 4, 16, len(model.single_transformer_blocks))
    assert double.itemsize == 2 and double.weights_overlapped == width**2
    assert single.weights_overlapped == 5 * width**2  # the MLP of a single block is computed beside its attention
    grouped = CASES["lumina2"].build()
    (work,) = workloads([Target("lumina2", grouped, get_cp_plan(grouped))], ["native"], None, TYPICAL["cpu"])
    assert (work.heads, work.kv_heads, work.itemsize) == (4, 2, 4)


def test_the_tokens_that_are_assumed():
    def of(name, *bases):
        return typical_tokens(type(name, bases, {}))

    wan = type("WanTransformer3DModel", (), {})
    assert typical_tokens(wan) == 32_760 and of("MyWan", wan) == 32_760
    assert of("FluxTransformer2DModel") == 4_608 and of("NewTransformer3DModel") == 32_760
    assert of("NewAudioTransformer3DModel") == 1_024


def test_typical_links_are_complete():
    assert NETWORK.time(25e9) == pytest.approx(1.0, rel=1e-3)
    assert set(KINDS) == {"cuda", "cpu"} and set(TYPICAL) == {"nvlink", "pcie", "host memory", "cpu"}
