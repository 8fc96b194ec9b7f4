"""Microseconds of host time that context parallelism adds to a forward, and the exchanges of a repeated forward.

    torchrun --nproc_per_node 2 benchmarks/host_time.py [--compile] [--output host_time.json]
    torchrun --nproc_per_node 2 benchmarks/host_time.py --device cuda --compile      # the same on GPUs

The model has as many blocks as Flux, but tiny tensors, so that a forward takes as long as its Python code, its kernel
launches and its exchanges. Variants are the unchanged model ("none"), and the model after
`enable_context_parallel(model, inputs=...)`. They share weights and take turns in rounds, in alternating order. Times
are medians over all rounds, in microseconds per forward, for each rank:

wall_us     wall time until the model returns, including waiting for the other rank
cpu_us      CPU time of the calling thread, without waiting
inputs_us   wall time of the hook that compares and exchanges inputs (with "trust", of the hook that counts forwards)

`operations` are the additional calls of one repeated forward compared with "trust": collectives, copies, and reads of a
tensor's value (`_local_scalar_dense`), for which a host waits for its GPU.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measuring import Report
from ranks import Ranks
from real_shapes import TINY, TINY_FLUX, RealModel

import diffusers_attn

VARIANTS = ("none", "trust", "broadcast", "check")
CONFIG = TINY_FLUX | {"num_layers": 19, "num_single_layers": 38}
MODEL = RealModel("Flux's 57 blocks, tiny", "FluxTransformer2DModel", CONFIG, TINY["flux"].make_inputs, torch.float32)


class Operations(TorchDispatchMode):
    """Counts operations that exchange, copy between devices or read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d" in name or "_local_scalar_dense" in name or name.startswith(("aten._to_copy", "aten.copy_")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Variant:
    """One of `VARIANTS`: a copy of the model that shares its weights."""

    def __init__(self, name: str, model: Any, provider: str, degrees: dict[str, int], compiled: bool) -> None:
        weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.name, self.model = name, copy.deepcopy(model, memo=weights)
        self.result: dict[str, Any] = {"variant": name}
        self.times: dict[str, list[float]] = {"wall_us": [], "cpu_us": [], "inputs_us": []}
        if name == "none":
            diffusers_attn.set_attention_provider(self.model, provider)
        else:
            diffusers_attn.enable_context_parallel(self.model, provider=provider, inputs=name, verbose=False, **degrees)
            number, hook = next(iter(self.model._forward_pre_hooks.items()))
            self.model._forward_pre_hooks[number] = self._timed(hook)
        if compiled:
            self.model.compile_repeated_blocks(dynamic=False)

    def _timed(self, hook: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args)
            finally:
                self.times["inputs_us"].append((time.perf_counter() - start) * 1e6)

        return call

    def step(self, inputs: dict[str, Any]) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        self.model(**inputs)
        self.times["cpu_us"].append((time.thread_time() - cpu) * 1e6)
        self.times["wall_us"].append((time.perf_counter() - wall) * 1e6)

    def turn(self, inputs: dict[str, Any], steps: int, ranks: Ranks) -> None:
        ranks.gather(None)  # they start together
        for _ in range(steps):
            self.step(inputs)
        ranks.synchronize()

    def forget(self) -> None:
        for each in self.times.values():
            each.clear()

    def operations(self, inputs: dict[str, Any]) -> collections.Counter[str]:
        with Operations() as operations:
            self.model(**inputs)
        return operations.counts


def measure(ranks: Ranks, args: argparse.Namespace, report: Report) -> None:
    model, inputs = MODEL.make(ranks.device), MODEL.inputs(ranks.device)
    provider = "native" if args.provider is None else args.provider
    degrees = {"ring_degree": args.ring_degree} if args.ring_degree else {}
    variants = [Variant(name, model, provider, degrees, args.compile) for name in args.variants]
    report.variants += variants
    for variant in variants:
        variant.turn(inputs, 3, ranks)
        variant.forget()
    gc.collect()
    gc.freeze()
    for turn in range(args.rounds):
        for variant in variants[:: 1 if turn % 2 == 0 else -1]:
            variant.turn(inputs, args.steps, ranks)
    # Compiled blocks would be compiled anew with a mode that looks at operations.
    counts = {} if args.compile else {each.name: each.operations(inputs) for each in variants}
    for variant in variants:
        own = {name: round(statistics.median(each)) for name, each in variant.times.items() if each}
        every = ranks.gather(own)
        variant.result |= {name: [each[name] for each in every] for name in own}
        if variant.name in counts and "trust" in counts:
            variant.result["operations"] = dict(counts[variant.name] - counts["trust"])
        if ranks.rank == 0:
            print(variant.result, flush=True)
    report.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS[:3]),
        help=f"variants to run (default: {' '.join(VARIANTS[:3])})",
    )
    parser.add_argument("--provider", help="attention provider (default: native)")
    parser.add_argument(
        "--ring_degree", type=int, help="number of ranks that exchange keys and values (default: automatic)"
    )
    parser.add_argument("--compile", action="store_true", help="compile each block (default: off)")
    parser.add_argument("--steps", type=int, default=10, help="number of forwards per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="number of turns of each variant (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit to record in the results (default: the one that git reports)")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("this measures several ranks: torchrun --nproc_per_node 2 benchmarks/host_time.py ...")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    ranks = Ranks(args.device, 90.0)
    with torch.no_grad():
        measure(ranks, args, Report(args.output, ranks, args))
    ranks.end(0)


if __name__ == "__main__":
    main()
