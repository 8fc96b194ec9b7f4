"""Milliseconds and memory of one transformer step on several GPUs: one GPU, diffusers' own strategies, and ours.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --compile --output results.json
    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --device cpu --tiny      # tries the script out
    python benchmarks/context_parallel.py --markdown results.json                       # prints the table of a run

All variants of a model exist at once and share its weights. Each has its own copy of the modules, its own hooks and
compiled blocks. They take turns in rounds, in alternating order, so that a hot GPU affects all of them. A turn is one
untimed step and several timed ones, queued without waiting in between, as in a pipeline's loop. The time of a step is
that of its slowest rank; reported is the median of all steps of all rounds. Errors are relative to an unmodified,
uncompiled model on one GPU. Memory is the allocator's peak in a step beyond the weights, and the device memory used
outside of the allocator since then: symmetric memory, and NCCL's buffers, which count for the first variant that uses a
group. For a step in a CUDA graph, the memory that the graph keeps counts.

"+graph" after a strategy, also one of diffusers', records the entire step (`apply_cuda_graphs`). Strategies such as
"gather-late" switch a mechanism of the library off (`mechanisms.py`).

If a variant fails on all ranks, the failure is recorded and the others continue. If it fails on some ranks, the rest
wait in an exchange that cannot end, so all ranks are ended. Earlier results are in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measuring import MIB, Report, diffusers_on_cpu, dynamo_counts, memory_taken, profiled, step_milliseconds
from mechanisms import switched
from options import add_models, add_options, heading, parse
from ranks import Ranks, RanksDifferError, VariantError
from real_shapes import REAL, TINY, RealModel
from strategies import STRATEGIES, USUAL

import diffusers_attn
from diffusers_attn.context_parallel.mesh import ContextParallelMesh


class Variant:
    """A way to run a model, with its modules and its measurements."""

    def __init__(self, name: str, provider: str, real: RealModel, model: Any, ranks: Ranks) -> None:
        self.name, self.provider, self.ranks = name, provider, ranks
        self.strategy, self.model = STRATEGIES[name], model
        self.result: dict[str, Any] = {"model": real.title, "strategy": name, "provider": provider}
        self.steps: list[float] = []

    def prepare(self, compiled: bool, inputs: dict[str, Any], warm_up: int) -> None:
        """Applies the strategy, compiles, and queues the first steps. Waits for no other rank, so that a failure of one
        rank is noticed."""
        weights = {id(tensor): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        self.began, self.before, self.graphs = time.perf_counter(), memory_taken(self.ranks.device), dynamo_counts()
        self.model = copy.deepcopy(self.model, memo=weights)
        self.result["note"] = self._apply()
        if compiled:
            self.model.compile_repeated_blocks(dynamic=False)
        if self.strategy.in_graph:
            diffusers_attn.apply_cuda_graphs(self.model)
        for _ in range(warm_up):
            self.out = self.step(inputs)

    def step(self, inputs: dict[str, Any]) -> Tensor:
        with switched(self.strategy.switches):
            return self.model(**inputs)[0]

    def measure(self, inputs: dict[str, Any], reference: Tensor) -> dict[str, Any]:
        """Measures this rank's error and memory, after `prepare`."""
        out, expected = self.out.float(), reference.float()
        own = {"relative_error": ((out - expected).norm() / expected.norm()).item()}
        self.result["prepare_seconds"] = round(time.perf_counter() - self.began, 1)
        del self.out, out, expected
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(inputs)
            self.ranks.synchronize()
            graphs = diffusers_attn.cuda_graphs_status(self.model)
            own["peak_mib"] = round((torch.cuda.max_memory_allocated() - self.before[0]) / MIB)
            own["peak_mib"] += graphs.pool_mib if graphs else 0
            own["replays"] = graphs.replays if graphs else 0
            own["outside_allocator_mib"] = round((memory_taken(self.ranks.device)[1] - self.before[1]) / MIB)
        return own | {name: count - self.graphs[name] for name, count in dynamo_counts().items()}

    def _apply(self) -> str:
        strategy, ranks = self.strategy, self.ranks
        if strategy.side == "diffusers":
            mesh = ranks.mesh(strategy)
            config = diffusers.ContextParallelConfig(ring_degree=mesh.size(0), ulysses_degree=mesh.size(1), mesh=mesh)
            self.model.set_attention_backend(self.provider)
            with diffusers_on_cpu() if ranks.device.type == "cpu" else contextlib.nullcontext():
                self.model.enable_parallelism(config=config)
            return ""
        if strategy.side == "auto":
            provider = None if self.provider == "auto" else self.provider
            return str(
                diffusers_attn.enable_context_parallel(
                    self.model, provider=provider, verbose=False, **strategy.arguments
                )
            )
        diffusers_attn.set_attention_provider(self.model, self.provider)
        if strategy.side == "single":
            return ""
        split_by = ContextParallelMesh.from_mesh(ranks.mesh(strategy), rotate_method=strategy.rotate_method)
        tracker = diffusers_attn.apply_context_parallel(self.model, split_by)
        return str(getattr(tracker, "transport", ""))

    def profile(self, inputs: dict[str, Any]) -> None:
        """Profiles a step on this rank's GPU: the kernels that take longest, and the time in which any kernel runs."""
        found = profiled(lambda: self.step(inputs))
        if found is not None:
            self.result["gpu"] = found

    def close(self) -> None:
        """Frees the memory for the next model."""
        diffusers_attn.remove_cuda_graphs(self.model)
        if self.strategy.side in ("ours", "auto"):
            diffusers_attn.disable_context_parallel(self.model)
            diffusers_attn.remove_context_parallel(self.model)
        self.model = None

    def turn(self, inputs: dict[str, Any], steps: int) -> None:
        """Times several steps, after an untimed one."""
        self.ranks.gather(None)  # they start together
        own = self.ranks.attempt(lambda: step_milliseconds(lambda: self.step(inputs), steps, self.ranks.device))
        self.steps += [max(times) for times in zip(*own)]
        self.result |= {"ms": round(statistics.median(self.steps), 3), "steps": [round(ms, 3) for ms in self.steps]}


def choose(args: argparse.Namespace, ranks: int) -> list[tuple[str, str]]:
    """Pairs of strategy and provider: all combinations that this number of ranks supports, and the extras."""
    names = args.strategies or USUAL
    pairs = []
    for name in names:
        strategy = STRATEGIES[name]
        if strategy.ring == strategy.ulysses == 2 and ranks != 4 and not args.strategies:
            continue
        providers = args.diffusers_backends if strategy.side == "diffusers" else args.providers
        pairs += [(name, provider) for provider in providers]
    for extra in args.extra:
        name, _, provider = extra.partition(":")
        if name not in STRATEGIES or not provider:
            raise SystemExit(f"--extra {extra}: STRATEGY:PROVIDER is accepted, with one of {', '.join(STRATEGIES)}")
        pairs.append((name, provider))
    return list(dict.fromkeys(pairs))


def bench_model(real: RealModel, args: argparse.Namespace, ranks: Ranks, report: Report) -> None:
    model, inputs = real.make(ranks.device), real.inputs(ranks.device)
    reference = model(**inputs)[0]
    ready: list[Variant] = []
    for name, provider in choose(args, ranks.size):
        variant = Variant(name, provider, real, model, ranks)
        report.variants.append(variant)

        try:
            ranks.attempt(lambda: variant.prepare(args.compile, inputs, args.warm_up))  # noqa: B023 (called at once)
            own = ranks.attempt(lambda: variant.measure(inputs, reference))  # noqa: B023
            variant.result |= {key: [each[key] for each in own] for key in own[0]}
            variant.turn(inputs, args.steps)
            ready.append(variant)
        except VariantError as failure:
            variant.result["error"] = str(failure)
        except RanksDifferError as failure:
            variant.result["error"] = str(failure)
            report.write()
            raise
        report.write()
        if ranks.rank == 0:
            print(_line(variant.result), file=sys.stderr, flush=True)
    for turn in range(1, args.rounds):
        for variant in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            try:
                variant.turn(inputs, args.steps)
            except VariantError as failure:
                variant.result["error"] = str(failure)
                ready.remove(variant)
        report.write()
    for variant in ready if args.profile and ranks.device.type == "cuda" else []:
        ranks.gather(None)
        ranks.attempt(lambda: variant.profile(inputs))  # noqa: B023
    report.write()
    for variant in ready:
        variant.close()


def _line(result: dict[str, Any]) -> str:
    found = result.get("error") or f"{result['ms']:.1f} ms, prepared in {result['prepare_seconds']} s"
    return f"{result['model']}, {result['strategy']}, {result['provider']}: {found}"


def markdown(report: dict[str, Any]) -> str:
    """Tables, one for each model."""
    where, results = report["environment"], report["results"]
    lines = [heading(where, "blocks compiled" if where["blocks_compiled"] else "eager")]
    for title in dict.fromkeys(result["model"] for result in results):
        these = [result for result in results if result["model"] == title and "error" not in result]
        alone = min((result["ms"] for result in these if result["strategy"] == "single"), default=None)
        theirs = min((result["ms"] for result in these if result["strategy"].startswith("diffusers")), default=None)
        lines += [
            "",
            f"**{title}**",
            "",
            "| strategy | provider | ms per step | of one GPU | of diffusers' best | relative error | peak MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for result in these:
            peak = max(result.get("peak_mib", [0]))
            outside = max(result.get("outside_allocator_mib", [0]))
            cells = [
                result["strategy"],
                f"`{result['provider']}`",
                f"{result['ms']:.1f}",
                f"{alone / result['ms']:.2f}x" if alone else "-",
                f"{theirs / result['ms']:.2f}x" if theirs else "-",
                f"{max(result['relative_error']):.1e}",
                f"{peak} + {outside}" if "peak_mib" in result else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(f"- {r['strategy']}, `{r['provider']}`: {r['note']}" for r in results if r.get("note"))
    failed = [f"- {_line(result)}" for result in results if "error" in result]
    return "\n".join(lines + ["", *notes] + (["", "Failed:", "", *failed] if failed else [])) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        metavar="STRATEGY",
        help=f"strategies to run, of {', '.join(STRATEGIES)} (default: {', '.join(USUAL)}; unified only on 4 ranks)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        help="providers of this library's strategies and of one GPU (default: _native_cudnn; on a CPU native)",
    )
    parser.add_argument(
        "--diffusers_backends", nargs="+", help="backends of diffusers' strategies (default: those of --providers)"
    )
    parser.add_argument(
        "--extra",
        nargs="+",
        default=[],
        metavar="STRATEGY:PROVIDER",
        help="further variants to run, such as ulysses:sage (default: none)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile each block, also under diffusers (default: off)"
    )
    parser.add_argument(
        "--warm_up", type=int, default=2, help="number of untimed steps at the start (default: %(default)s)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="profile the GPU in one step of each variant as well (default: off)"
    )
    add_options(parser, rounds=3, steps=3)
    args = parse(parser, markdown)
    usual = ["native" if args.device == "cpu" else "_native_cudnn"]
    args.providers, args.diffusers_backends = args.providers or usual, args.diffusers_backends or usual
    return args


def main() -> None:
    args = parse_arguments()
    diffusers.utils.logging.set_verbosity_error()  # that its context parallelism is experimental, for each variant
    # All variants compile the same functions: what one may recompile is not what all may together.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    ranks = Ranks(args.device, args.timeout)
    report = Report(args.output, ranks, args)

    @torch.no_grad()
    def measure() -> None:
        for name in args.models:
            bench_model((TINY if args.tiny else REAL)[name], args, ranks, report)
            torch._dynamo.reset()
            memory_taken(ranks.device)

    ranks.run(measure, report, markdown)


if __name__ == "__main__":
    main()
