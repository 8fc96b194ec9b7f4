"""Time of one layer's attention over several GPUs, with each transport of keys and values, and without an exchange.

    torchrun --nproc_per_node 2 benchmarks/allgather_kv.py --output results.json

Forward only, in bfloat16, many calls of one layer in a row, as in a model. Variants:

whole        this rank's queries over all keys in one call: the computation without any exchange
floor        the same in the gather's two calls and their merge, with the other ranks' keys in place
collective   the gather with collectives
symmetric    the gather through symmetric memory

Each is measured as called from Python, compiled by Inductor, and both in a CUDA graph of ten layers. The time of a
layer is the median over rounds, on the slowest rank. All variants take their turn in each round. Errors are relative to
float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from versions import versions

from diffusers_attn.context_parallel.attention.merge import merge
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.attention.partial_kernel import PartialKernel
from diffusers_attn.context_parallel.comm.transport import COLLECTIVE, SYMMETRIC, choose_transport
from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.context_parallel.sequences.sharding import Shards, split

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYERS = 10
REFERENCE_ROWS = 64


class Shape(NamedTuple):
    name: str
    heads: int
    length: int
    head_dim: int = 128


SHAPES = (
    Shape("Flux 1024²", 24, 4608),
    Shape("Wan 1.3B 480p, 81 frames", 12, 32760),
    Shape("Wan 14B 480p, 81 frames", 40, 32760),
)


def variants(shape: Shape, mesh: ContextParallelMesh, provider: str, full: list[Tensor]) -> dict[str, Attention]:
    """The variants by name, as functions of this rank's query, key and value."""
    shards = Shards.contiguous(shape.length, mesh.size)
    kernel = PartialKernel(provider)
    all_keys, all_values = (tensor.contiguous() for tensor in full[1:])
    other_keys, other_values = (
        torch.cat([tensor.narrow(1, *run) for run in shards.without(mesh.rank)], dim=1).contiguous()
        for tensor in full[1:]
    )

    def complete(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel.forward(query, all_keys, all_values, None, False)[0]

    def floor(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        local = kernel.forward(query, key, value, None, False)
        remote = kernel.forward(query, other_keys, other_values, None, False)
        return merge(*local, *remote, dtype=torch.float32, out_dtype=query.dtype)[0]

    def gathered(transport: str) -> Attention:
        options = {"mesh": mesh, "query_shards": shards, "key_shards": shards, "provider": provider}

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return parallel_attention(query, key, value, transport=transport, **options)  # type: ignore[arg-type]

        return call

    return {"whole": complete, "floor": floor, COLLECTIVE: gathered(COLLECTIVE), SYMMETRIC: gathered(SYMMETRIC)}


def layers(attention: Attention, local: list[Tensor]) -> Tensor:
    out = local[0]
    for _ in range(LAYERS):
        out = attention(*local)
    return out


def graphed(attention: Attention, local: list[Tensor]) -> Callable[[], Tensor]:
    """Captures `LAYERS` calls in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(attention, local)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread looks after its events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = layers(attention, local)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def microseconds(call: Callable[[], Tensor], repeats: int) -> float:
    """Microseconds per layer on this rank."""
    call()
    dist.barrier()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats / LAYERS


def measure(calls: Mapping[str, Callable[[], Tensor]], rounds: int, seconds: float) -> dict[str, float]:
    """The median time of each variant, on the slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        microseconds(call, 2)
        layer = slowest(microseconds(call, 2))
        repeats[name] = max(2, int(seconds * 1e6 / rounds / layer / LAYERS))
    for number in range(rounds):
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            times[name].append(slowest(microseconds(calls[name], repeats[name])))
    return {name: round(statistics.median(each), 1) for name, each in times.items()}


def slowest(value: float) -> float:
    tensor = torch.tensor(value, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def error(out: Tensor, query: Tensor, full: list[Tensor]) -> float:
    """The relative error of some rows."""
    rows = torch.linspace(0, query.shape[1] - 1, REFERENCE_ROWS, device=query.device).long()
    q, k, v = query[:, rows].double(), full[1].double(), full[2].double()
    expected = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64, device=q.device)
    for head in range(q.shape[2]):
        weights = (q[0, :, head] @ k[0, :, head].T * q.shape[-1] ** -0.5).softmax(dim=-1)
        expected[0, :, head] = weights @ v[0, :, head]
    return slowest(((out[:, rows].double() - expected).norm() / expected.norm()).item())


def bench(shape: Shape, mesh: ContextParallelMesh, args: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    size = 1, shape.length, shape.heads, shape.head_dim
    full = [torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(3)]
    shards = Shards.contiguous(shape.length, mesh.size)
    local = [split(tensor, shards, 1, mesh.rank).contiguous() for tensor in full]
    functions = variants(shape, mesh, args.provider, full)
    # Of its own for each shape: once a graph was captured, its calls have one more barrier.
    chosen, gather = choose_transport(mesh.ring, mesh.device_type)
    if chosen.kind != SYMMETRIC:
        del functions[SYMMETRIC]
    compiled = {name: torch.compile(function, fullgraph=True, dynamic=False) for name, function in functions.items()}
    errors, times = {}, {}
    for mode, each in (("eager", functions), ("compiled", compiled)):
        for name, function in each.items():
            errors[f"{name}, {mode}"] = error(function(*local), local[0], full)
        times[mode] = measure({name: partial(layers, f, local) for name, f in each.items()}, args.rounds, args.seconds)
    for mode, each in (("eager, graph", functions), ("compiled, graph", compiled)):
        graphs = {name: graphed(function, local) for name, function in each.items()}
        for name, graph in graphs.items():
            errors[f"{name}, {mode}"] = error(graph(), local[0], full)
        times[mode] = measure(graphs, args.rounds, args.seconds)
    result = {"shape": shape._asdict(), "transport": chosen._asdict(), "microseconds": times, "errors": errors}
    return result | {"symmetric_bytes": 0 if gather is None else gather.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="_native_cudnn", help="attention provider (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        type=int,
        nargs="*",
        help=f"numbers of the shapes, of {dict(enumerate(s.name for s in SHAPES))} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=6, help="number of turns of each variant (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds to measure each variant in each mode (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit to record in the results (default: the one that git reports)")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = ContextParallelMesh.from_mesh(init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("ring",)))
    report: dict[str, Any] = {"environment": versions("cuda", args.commit), "gpus": mesh.size}
    report |= {"provider": args.provider, "results": []}
    for number in args.shapes or range(len(SHAPES)):
        with torch.no_grad():
            report["results"].append(bench(SHAPES[number], mesh, args))
        if mesh.rank == 0:
            print(json.dumps(report["results"][-1]), flush=True)
            if args.output:
                args.output.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
