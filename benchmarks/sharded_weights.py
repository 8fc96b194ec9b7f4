"""Memory per rank and milliseconds per step with `shard_weights=True`, beside the same split model without it.

    torchrun --nproc_per_node 2 benchmarks/sharded_weights.py --output sharded.json     # about 2 minutes on two GPUs
    torchrun --nproc_per_node 2 benchmarks/sharded_weights.py --device cpu --tiny       # tries the script out
    python benchmarks/sharded_weights.py --markdown sharded.json                        # prints the table of a run

The model is Wan 14B (40 layers, bfloat16, 480 x 832, 81 frames) with random weights. Three measurements:

- "load": the model is in CPU memory. `enable_context_parallel(model, shard_weights=True)` moves it to the GPUs and
  shards it, one block at a time. Reported are its seconds, the peak of GPU memory meanwhile, and what is left.
- "split": the sequence is split between the ranks, and every rank has all weights.
- "sharded": the sequence is split and the weights are sharded. The same weights, so errors are relative to "split".

"split" and "sharded" take turns in rounds, and one turn is an untimed step and several timed ones. The time of a step
is that of its slowest rank; reported is the median. `expected_mib` is what sharding should need: the weights divided by
the number of ranks, one block, and what a step of "split" takes beyond its weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_ATTN_LINKS", "typical")  # a measurement of links would count in the peak of memory

import diffusers
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from accelerate import init_empty_weights
from measuring import MIB, Report, memory_taken, step_milliseconds
from options import add_options, heading, parse
from ranks import Ranks
from real_shapes import REAL, TINY, RealModel

from diffusers_attn import disable_context_parallel, enable_context_parallel


class Measured:
    """The result of one variant."""

    def __init__(self, real: RealModel, variant: str) -> None:
        self.result: dict[str, Any] = {"model": real.title, "variant": variant}
        self.steps: list[float] = []


def in_cpu_memory(real: RealModel) -> Any:
    """The model in CPU memory, without values. Memory of a weight is taken from the machine when it is first written,
    so that these models take none."""
    with init_empty_weights(include_buffers=False), default_dtype(real.dtype):
        model = getattr(diffusers, real.model_class)(**real.config)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return model.eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def peak_mib(device: torch.device) -> int:
    return round(torch.cuda.max_memory_allocated() / MIB) if device.type == "cuda" else 0


def allocated_mib(device: torch.device) -> int:
    memory_taken(device)
    return round(torch.cuda.memory_allocated() / MIB) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        memory_taken(device)
        torch.cuda.reset_peak_memory_stats()


def load(real: RealModel, ranks: Ranks, measured: Measured) -> None:
    """Measures how a model goes from CPU memory to shards on the devices."""
    model = in_cpu_memory(real)
    reset_peak(ranks.device)

    def enable() -> dict[str, Any]:
        began = time.perf_counter()
        report = enable_context_parallel(model, shard_weights=True, verbose=False)
        ranks.synchronize()
        seconds = round(time.perf_counter() - began, 1)
        return {"report": str(report), "seconds": seconds, "load_peak_mib": peak_mib(ranks.device)}

    own = ranks.attempt(enable)
    measured.result |= {"report": own[0]["report"], "seconds": [each["seconds"] for each in own]}
    measured.result["load_peak_mib"] = [each["load_peak_mib"] for each in own]
    measured.result["shards_mib"] = ranks.gather(allocated_mib(ranks.device))


def bench(real: RealModel, args: argparse.Namespace, ranks: Ranks, report: Report) -> None:
    loaded = Measured(real, "load")
    report.variants.append(loaded)
    load(real, ranks, loaded)
    report.write()
    gc.collect()
    if ranks.rank == 0:
        print(json.dumps(loaded.result), file=sys.stderr, flush=True)

    model, inputs = real.make(ranks.device), real.inputs(ranks.device)
    weights = sum(each.nbytes for each in model.parameters()) / MIB
    block = max(sum(each.nbytes for each in block.parameters()) for block in model.blocks) / MIB
    split, sharded = Measured(real, "split"), Measured(real, "sharded")
    report.variants += [split, sharded]
    outputs: dict[str, torch.Tensor] = {}

    def turn(measured: Measured, first: bool, steps: int) -> None:
        is_sharded = measured is sharded
        ranks.attempt(
            lambda: enable_context_parallel(model, shard_weights=is_sharded, cuda_graphs=False, verbose=False)
        )
        step: Callable[[], Any] = lambda: model(**inputs)[0]  # noqa: E731
        if first:
            ranks.attempt(lambda: step_milliseconds(step, 0, ranks.device))  # builds what stays: buffers, kernels
            held = allocated_mib(ranks.device)
            reset_peak(ranks.device)
            outputs[measured.result["variant"]] = ranks.attempt(lambda: step().float().cpu())[ranks.rank]
            ranks.synchronize()
            measured.result |= {"held_mib": ranks.gather(held), "peak_mib": ranks.gather(peak_mib(ranks.device))}
        ranks.gather(None)  # they start together
        times = ranks.attempt(lambda: step_milliseconds(step, steps, ranks.device))
        measured.steps += [max(each) for each in zip(*times)]
        measured.result |= {"ms": round(statistics.median(measured.steps), 3)}
        measured.result["steps"] = [round(ms, 3) for ms in measured.steps]
        ranks.attempt(lambda: disable_context_parallel(model))

    for number in range(args.rounds):
        for measured in (split, sharded) if number % 2 == 0 else (sharded, split):
            turn(measured, number == 0, args.steps)
            report.write()
            if ranks.rank == 0:
                print(json.dumps(measured.result), file=sys.stderr, flush=True)
    beyond = max(split.result["peak_mib"]) - weights
    found, expected = outputs["sharded"], outputs["split"]
    wrong = ((found - expected).norm() / expected.norm()).item()
    sharded.result |= {
        "weights_mib": round(weights),
        "block_mib": round(block),
        "expected_mib": round(weights / ranks.size + block + beyond),
        "relative_error": ranks.gather(wrong),
        "slower_by": round(sharded.result["ms"] / split.result["ms"] - 1, 4),
    }
    report.write()


def markdown(report: dict[str, Any]) -> str:
    """A table of a run."""
    where, results = report["environment"], {each["variant"]: each for each in report["results"]}
    lines = [
        heading(where),
        "",
        "| | ms per step | peak MiB per rank | of it held between steps |",
        "|---|---|---|---|",
    ]
    for name in ("split", "sharded"):
        if name in results and "ms" in results[name]:
            each = results[name]
            lines.append(f"| {name} | {each['ms']:.1f} | {max(each['peak_mib'])} | {max(each['held_mib'])} |")
    sharded, loaded = results.get("sharded", {}), results.get("load", {})
    if "expected_mib" in sharded:
        lines += [
            "",
            f"Sharded: {sharded['slower_by']:+.1%} per step; expected {sharded['expected_mib']} MiB (weights of "
            f"{sharded['weights_mib']} MiB / {where['ranks']}, a block of {sharded['block_mib']} MiB, activations); "
            f"relative error {max(sharded['relative_error']):.1e}.",
        ]
    if "seconds" in loaded:
        lines.append(
            f"Loaded from CPU memory in {max(loaded['seconds'])} s, with at most {max(loaded['load_peak_mib'])} MiB "
            f"per GPU, and {max(loaded['shards_mib'])} MiB afterwards."
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40, help="number of the model's layers (default: %(default)s)")
    add_options(parser, rounds=2, steps=3)
    args = parse(parser, markdown)
    args.compile = False
    return args


def main() -> None:
    args = parse_arguments()
    full = dataclasses.replace(
        REAL["wan-14b"],
        title=f"Wan 14B 480p, 81 frames, {args.layers} layers",
        config={**REAL["wan-14b"].config, "num_layers": args.layers},
    )
    ranks = Ranks(args.device, args.timeout)
    report = Report(args.output, ranks, args)

    @torch.no_grad()
    def measure() -> None:
        bench(TINY["wan-14b"] if args.tiny else full, args, ranks, report)

    ranks.run(measure, report, markdown)


if __name__ == "__main__":
    main()
