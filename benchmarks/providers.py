"""Speed and error of every usable provider on this GPU, at the shapes of four models.

    python benchmarks/providers.py --output results.json      measures (some minutes)
    python benchmarks/providers.py --markdown results.json    prints the tables for docs/providers.md

Each shape is measured in rounds, in which every provider takes a turn, in alternating order, so that a hot GPU or a
busy neighbour affects all of them. A time is the median of all rounds' single calls, between two CUDA events. TFLOP/s
count 4·B·H·S²·D for a forward and 14·B·H·S²·D for a forward and its backward. The error is relative to attention in
float64 for some of the query rows, with normally distributed inputs in bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusers_attn import attention_dispatch, attention_provider, list_providers

DTYPE = torch.bfloat16
ROUNDS = 4
REFERENCE_ROWS = 256
PACKAGES = (
    "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "sageattention", "sageattn3", "xformers",
    "kernels",
)  # fmt: skip


class Shape(NamedTuple):
    name: str
    batch: int
    heads: int
    length: int
    head_dim: int

    def tflop(self, factor: int) -> float:
        return factor * self.batch * self.heads * self.length**2 * self.head_dim / 1e12


SHAPES = (
    Shape("Flux 1024²", 1, 24, 4608, 128),
    Shape("Wan 1.3B 480p, 81 frames", 1, 12, 32760, 128),
    Shape("Wan 14B 720p, 81 frames, 10 heads", 1, 10, 75600, 128),
    Shape("CogVideoX-5B", 2, 48, 17776, 64),
)
SMALL = Shape("small", 1, 24, 256, 64)
"""where a call's own cost on the CPU is what takes the time."""


def make(shape: Shape) -> list[Tensor]:
    """Query, key and value as in diffusers: `[batch, length, heads, head_dim]` in memory, viewed with heads first."""
    size = shape.batch, shape.length, shape.heads, shape.head_dim
    return [torch.randn(size, device="cuda", dtype=DTYPE).transpose(1, 2) for _ in range(3)]


def reference(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of some query rows, and their attention in float64, `[batch, heads, rows, head_dim]`."""
    rows = torch.linspace(0, query.shape[2] - 1, REFERENCE_ROWS, device=query.device).long().unique()
    expected = torch.empty(*query.shape[:2], len(rows), query.shape[3], dtype=torch.float64, device=query.device)
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            q, k, v = query[batch, head, rows].double(), key[batch, head].double(), value[batch, head].double()
            expected[batch, head] = (q @ k.T * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return rows, expected


def direct_calls() -> dict[str, Callable[..., Tensor]]:
    """The kernels, called through their packages' own functions, on `[batch, heads, length, head_dim]`."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def flash_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)

    def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from sageattention import sageattn

        return sageattn(q, k, v, tensor_layout="HND")

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return {"native": native, "flash": flash, "flash_4": flash_4, "sage": sage, "xformers": xformers}


def through(provider: str) -> Callable[..., Tensor]:
    """Calls `attention_dispatch` in the provider's scope."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with attention_provider(provider):
            return attention_dispatch(query, key, value)

    return call


def with_backward(call: Callable[..., Tensor]) -> Callable[..., Any]:
    def train(query: Tensor, key: Tensor, value: Tensor) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = call(*inputs)
        return torch.autograd.grad(out, inputs, out.detach())

    return train


def milliseconds(call: Callable[..., Any], inputs: list[Tensor]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(*inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(calls: dict[str, Callable[..., Any]], inputs: list[Tensor], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call. They alternate, for `seconds` each in total."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            milliseconds(calls[name], inputs)  # the previous one's data is still in the cache
            spent = 0.0
            while not times[name] or spent < seconds / ROUNDS * 1e3:
                times[name].append(milliseconds(calls[name], inputs))
                spent += times[name][-1]
    return {name: statistics.median(each) for name, each in times.items()}


def works(call: Callable[..., Any], inputs: list[Tensor]) -> str:
    """Compiles and warms up `call`. Returns the reason why it cannot be measured, or ""."""
    try:
        call(*inputs)
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the others are still measured
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def bench_shape(shape: Shape, providers: list[str], seconds: float) -> list[dict[str, Any]]:
    inputs = make(shape)
    rows, expected = reference(*inputs)
    forward: dict[str, Callable[..., Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in providers:
        result = results[name] = {"shape": shape.name, "provider": name}
        needed = shape.batch * shape.heads * shape.length**2 * 12
        if name == "_native_math" and needed > torch.cuda.mem_get_info()[0]:
            result["skipped"] = f"it would form every score: {needed / 2**30:.0f} GiB"
            continue
        with torch.no_grad():
            result_of_warm_up = works(through(name), inputs)
            if result_of_warm_up:
                result["skipped"] = result_of_warm_up
                continue
            out = through(name)(*inputs)
        result["relative_error"] = ((out[:, :, rows].double() - expected).norm() / expected.norm()).item()
        forward[name] = through(name)
        del out
    for name, call in direct_calls().items():
        if name in forward:
            with torch.no_grad():
                if not works(call, inputs):
                    forward[f"{name} direct"] = call
    with torch.no_grad():
        medians = measure(forward, inputs, seconds)
    train = {name: with_backward(forward[name]) for name in forward if not name.endswith("direct")}
    train = {name: call for name, call in train.items() if not works(call, inputs)}
    medians_train = measure(train, inputs, seconds)
    for name, result in results.items():
        if name in medians:
            result["forward_ms"] = medians[name]
            result["forward_tflops"] = shape.tflop(4) / medians[name] * 1e3
        if name in medians_train:
            result["train_ms"] = medians_train[name]
            result["train_tflops"] = shape.tflop(14) / medians_train[name] * 1e3
        if f"{name} direct" in medians:
            result["direct_ms"] = medians[f"{name} direct"]
    return list(results.values())


def bench_host(providers: list[str]) -> dict[str, dict[str, float]]:
    """Microseconds of CPU time per call, of ours and of the package's own function: the smallest median."""
    inputs = make(SMALL)
    found: dict[str, dict[str, float]] = {}
    direct = direct_calls()
    for name in providers:
        with torch.no_grad(), attention_provider(name):
            calls = {"ours": attention_dispatch}
            if name in direct:
                calls["direct"] = direct[name]
            if any(works(call, inputs) for call in calls.values()):
                continue
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(5):
                for label, call in calls.items():
                    best[label] = min(best[label], host_microseconds(call, inputs))
            found[name] = best
    return found


def host_microseconds(call: Callable[..., Any], inputs: list[Tensor], repeats: int = 40) -> float:
    """Times few calls, so that the GPU's queue does not fill up and delay the CPU."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def environment(commit: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_properties(0)
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "versions": versions,
    }


def git_commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def markdown(report: dict[str, Any]) -> str:
    """The tables of docs/providers.md."""
    where = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['gpu']} (compute capability {where['compute_capability']}), CUDA {where['cuda']}, "
        f"cuDNN {where['cudnn']}, {packages}; {where['date']}, commit {where['commit']}: `{where['command']}`",
        "",
    ]
    shapes = list(dict.fromkeys(result["shape"] for result in report["results"]))
    by = {(result["provider"], result["shape"]): result for result in report["results"]}
    providers = list(dict.fromkeys(provider for provider, _ in by))
    lines += [
        "Forward TFLOP/s (forward and backward in brackets):",
        "",
        f"| provider | {' | '.join(shapes)} | relative error |",
        "|---|" + "---|" * (len(shapes) + 1),
    ]
    for provider in providers:
        cells = [_cell(by.get((provider, shape), {})) for shape in shapes]
        errors = [by[key]["relative_error"] for key in by if key[0] == provider and "relative_error" in by[key]]
        lines.append(f"| `{provider}` | {' | '.join(cells)} | {f'{max(errors):.1e}' if errors else '-'} |")
    direct = {key: result for key, result in by.items() if "direct_ms" in result}
    if direct:
        lines += ["", "Through this library over the package's own function, time of one call on the GPU:", ""]
        named = list(dict.fromkeys(provider for provider, _ in direct))
        lines += [f"| provider | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
        for provider in named:
            ratios = [
                f"{direct[provider, shape]['forward_ms'] / direct[provider, shape]['direct_ms']:.3f}"
                if (provider, shape) in direct
                else "-"
                for shape in shapes
            ]
            lines.append(f"| `{provider}` | {' | '.join(ratios)} |")
    if report.get("host"):
        lines += [
            "",
            "Time of one call on the CPU, microseconds, without gradients:",
            "",
            "| provider | through this library | the package's own function |",
            "|---|---|---|",
        ]
        for provider, times in report["host"].items():
            own = f"{times['direct']:.0f}" if "direct" in times else "-"
            lines.append(f"| `{provider}` | {times['ours']:.0f} | {own} |")
    skipped = [f"- `{r['provider']}`, {r['shape']}: {r['skipped']}" for r in report["results"] if "skipped" in r]
    return "\n".join(lines + (["", "Not measured:", "", *skipped] if skipped else [])) + "\n"


def _cell(result: dict[str, Any]) -> str:
    if "forward_tflops" not in result:
        return "-"
    train = f" ({result['train_tflops']:.0f})" if "train_tflops" in result else ""
    return f"{result['forward_tflops']:.0f}{train}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results; required to measure")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="RESULTS",
        help="print the tables of these earlier results, and measure nothing",
    )
    parser.add_argument("--providers", nargs="+", help="providers to measure (default: all that are usable here)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=int,
        choices=range(len(SHAPES)),
        help="numbers of the shapes to measure (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="seconds to measure each provider, shape and direction (default: %(default)s)",
    )
    parser.add_argument(
        "--commit", default="", help="commit to record in the results (default: the one that git reports)"
    )
    args = parser.parse_args()
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())), end="")
        return
    if not args.output:
        parser.error("give --output FILE to measure, or --markdown FILE to print the tables of an earlier run")
    if not torch.cuda.is_available():
        parser.error("this measures GPU kernels, and PyTorch sees no CUDA device")
    torch.manual_seed(0)
    usable = [status.name for status in list_providers() if status.available]
    providers = [name for name in args.providers or usable if name in usable]
    report: dict[str, Any] = {"environment": environment(args.commit), "results": []}
    report["host"] = bench_host(providers)
    for number in args.shapes or range(len(SHAPES)):
        begin = time.monotonic()
        report["results"] += bench_shape(SHAPES[number], providers, args.seconds)
        args.output.write_text(json.dumps(report, indent=1) + "\n")  # what there is, should it be interrupted
        print(f"{SHAPES[number].name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
