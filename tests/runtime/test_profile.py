"""`profile`: names, and parts that add up to the whole; on CPU ranks, and from a trace as a GPU makes it."""

from __future__ import annotations

import json
import time

import pytest
import torch

from diffusers_attn import (
    AttentionProviderError,
    attention_dispatch,
    disable_context_parallel,
    enable_context_parallel,
    known_calls,
    profile,
    set_attention_provider,
)
from diffusers_attn.runtime.profiling.names import of_kernel, of_operator
from diffusers_attn.runtime.profiling.timeline import divide

from ..parallelize.test_enable import build, inputs
from ..tiny_pipelines import make

SLEEP = 0.2
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 16}


def on_ranks(meshes):
    model, given = build("wan"), inputs("wan")
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
    with torch.no_grad():
        model(**given)
        with profile(model) as report:
            model(**given)
    disable_context_parallel(model)
    return report.parts, report.seconds


def test_two_ranks(pool):
    for parts, seconds in pool.run(2, on_ranks):
        found = {tuple(each[:4]): each for each in parts}
        names = ("WanTransformer3DModel", "other", "", ""), ("outside of components", "other", "", "")
        attention = [("attention", "native", "gather 2"), ("attention", "native", "one rank")]
        exchanges = [("exchange", "", "gather 2"), ("exchange", "", "")]  # the last: inputs and outputs of the model
        assert set(found) == {*names, *(("WanTransformer3DModel", *each) for each in attention + exchanges)}
        assert {found["WanTransformer3DModel", *each].calls for each in attention} == {2}  # each of two blocks has both
        assert found[names[0]].seconds > SLEEP and found[names[0]].calls == 1
        assert sum(each.seconds for each in parts) == pytest.approx(seconds)


def on_groups(meshes):
    model, given = build("wan"), inputs("wan")
    enable_context_parallel(model, guidance_degree=2, verbose=False)  # the two samples, each on two ranks
    with torch.no_grad(), profile(model) as report:
        model(**given)
    disable_context_parallel(model)
    return {each.strategy: each.calls for each in report.parts if each.kind == "exchange"}


def test_groups_of_ranks(pool):
    for exchanges in pool.run(4, on_groups):
        assert exchanges["groups of ranks"] == 1 and len(exchanges) == 3


def test_a_pipeline(tmp_path):
    pipe = make("wan")
    set_attention_provider(pipe, "native")
    with profile(pipe) as report:
        assert "has not ended" in str(report)
        pipe("a cat", **CALL)
    assert known_calls.prepared == {}
    components = ["text_encoder", "transformer", "vae.decode", "outside of components"]
    assert list(dict.fromkeys(each.component for each in report.parts)) == components
    assert report.by("component").keys() == set(components) and report.by("kind").keys() == {"attention", "other"}
    assert report.by("provider").keys() == {
        "native",
        "aten::scaled_dot_product_attention",
    }  # the encoders' is PyTorch's
    header, *lines, last = str(report).splitlines()
    assert len(lines) == len(report.parts) and header.split()[:2] == ["component", "kind"] and "100.0%" in last
    report.save_trace(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    with pytest.raises(AttentionProviderError, match=r"\.json\.gz file is accepted"):
        report.save_trace(tmp_path / "trace.txt")


def test_a_compiled_graph_is_not_compiled_again():
    graphs = []
    compiled = torch.compile(attention_dispatch, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    query = torch.randn(1, 2, 5, 8)
    compiled(query, query, query)
    with profile(torch.nn.Identity()) as report:
        compiled(query, query, query)
    compiled(query, query, query)
    assert len(graphs) == 1 and "aten::scaled_dot_product_attention" in report.by("provider")


def test_what_is_refused():
    with pytest.raises(AttentionProviderError, match="a diffusers pipeline is accepted"):
        profile(object()).__enter__()
    with profile(torch.nn.Identity()) as report, pytest.raises(AttentionProviderError, match="cannot be nested"):
        profile(torch.nn.Identity()).__enter__()
    with pytest.raises(AttentionProviderError, match="'component', 'kind'"):
        report.by("module")


def host(name, start, duration, category="user_annotation", correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": start, "dur": duration, "args": args}


def kernel(name, start, duration, correlation):
    return {
        "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start, "dur": duration,
        "args": {"correlation": correlation},
    }  # fmt: skip


def test_a_trace_of_a_gpu():
    """Kernels belong to what launched them, and in a CUDA graph to their names; times in µs."""
    events = [
        host("diffusers_attn|profile", 0, 1000),
        host("diffusers_attn|component|transformer", 10, 800),
        host("diffusers_attn|attention|flash_4|gather 2", 20, 50),
        host("_c10d_functional::all_to_all_single", 25, 10, "cpu_op"),
        host("cudaLaunchKernel", 30, 1, "cuda_runtime", 1),
        host("cudaLaunchKernel", 50, 1, "cuda_runtime", 2),
        host("cudaLaunchKernel", 90, 1, "cuda_runtime", 3),
        host("cudaGraphLaunch", 200, 1, "cuda_runtime", 4),
        kernel("ncclDevKernel_SendRecv", 100, 100, 1),
        kernel("some_cute_kernel", 150, 100, 2),
        kernel("gemm", 300, 100, 3),
        kernel("cudnn_generated_fort_native_sdpa_sm90", 500, 100, 4),
        kernel("ncclDevKernel_SendRecv", 550, 100, 4),
    ]
    times = divide(events)
    found = {(component, *label): round(seconds * 1e6) for (component, label), seconds in times.seconds.items()}
    assert found == {
        ("transformer", "waiting for the host", "", ""): 100 + 50 + 100,
        ("transformer", "exchange", "", "gather 2"): 50,
        ("transformer", "attention", "flash_4", "gather 2"): 100,
        ("transformer", "other", "", ""): 100,
        ("transformer", "attention", "cuDNN", ""): 100,
        ("transformer", "exchange", "", ""): 50,
        ("outside of components", "waiting for the host", "", ""): 350,
    }
    assert round(times.hidden * 1e6) == 50 + 50 and times.from_graphs == 2 and times.total == 1e-3


def test_names_of_operators_and_kernels():
    kinds = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::mm": None,
        "diffusers_attn::flash_4": "attention", "diffusers_attn::cudnn_forward": "attention",
        "diffusers_attn::check_local_keys": None, "_c10d_functional::wait_tensor": "exchange",
        "flash_attn::_flash_attn_forward": "attention", "diffusers_attn::symmetric_gather_start": "exchange",
    }  # fmt: skip
    assert {name: getattr(of_operator(name), "kind", None) for name in kinds} == kinds
    providers = {
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "flash",
        "fmha_cutlassF_bf16_aligned": "memory-efficient",
        "void qk_int_sv_f16_attn_kernel<...>": "sage", "triton_tem_fused_flex_attention_0": "flex",
        "void pytorch_flash::flash_bwd_dot_do_o": "flash", "ampere_bf16_s16816gemm": None,
    }  # fmt: skip
    assert {name: getattr(of_kernel(name), "provider", None) for name in providers} == providers
