"""Seconds of a whole call of a pipeline, from the embeddings of a prompt to a picture or video: diffusers, and ours.

    python benchmarks/pipelines.py --output one.json                              # FluxPipeline on one GPU
    torchrun --nproc_per_node 2 benchmarks/pipelines.py --output two.json         # on several
    torchrun --nproc_per_node 2 benchmarks/pipelines.py --pipeline wan --steps 8  # WanPipeline with guidance
    torchrun --nproc_per_node 2 benchmarks/pipelines.py --device cpu --tiny       # tries the script out

"ours" is what the README's lines give, with every default: on one GPU `set_attention_provider(pipe, "auto")` and
`apply_compile(pipe.transformer)`, on several `enable_context_parallel(pipe)` and `apply_compile(pipe.transformer)`.
"ours-sequences" splits sequences alone (`guidance_degree=1`), and "ours-alone" runs on each GPU by itself. "-eager"
leaves the compiling out. diffusers' variants compile by `compile_repeated_blocks`; on several GPUs they use
`enable_parallelism`. Weights are random, of the real size; the pipeline's own loop, scheduler and VAE run.

All variants exist at once and share their weights. They take turns, in alternating order. A turn is one call; its time
is that of the slowest rank. Reported are all turns and their median. The first calls of a variant, which compile and
record, are timed apart.
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
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measuring import MIB, Report, diffusers_on_cpu
from options import add_options, heading, parse
from ranks import Ranks, VariantError
from real_pipelines import PIPELINES
from strategies import STRATEGIES

import diffusers_attn

WARM_UP = 3
"""Calls before the first timed one: the first compiles, and a later one records CUDA graphs."""


class Variant:
    """A pipeline, with a transformer and a VAE of its own that share the weights of all."""

    def __init__(self, name: str, pipe: Any, ranks: Ranks) -> None:
        self.name, self.ranks = name, ranks
        models = pipe.transformer, pipe.vae
        weights = {id(each): each for model in models for each in (*model.parameters(), *model.buffers())}
        transformer, vae = (copy.deepcopy(model, memo=dict(weights)) for model in models)
        self.pipe = type(pipe)(**{**pipe.components, "transformer": transformer, "vae": vae})
        self.pipe.set_progress_bar_config(disable=True)
        self.calls: list[float] = []
        self.result: dict[str, Any] = {"pipeline": type(pipe).__name__, "variant": name}

    def prepare(self, call: dict[str, Any]) -> list[Any]:
        """Applies the variant and makes the first calls. Returns the pictures of the last one."""
        self._apply(self.name.removesuffix("-eager"), compiled=not self.name.endswith("-eager"))
        first = [self.seconds(call) for _ in range(WARM_UP)]
        self.result["first_calls_s"] = [round(each, 2) for each in first]
        graphs = diffusers_attn.cuda_graphs_status(self.pipe.transformer)
        self.result["cuda_graphs"] = str(graphs) if graphs else None
        return self.pictures

    def seconds(self, call: dict[str, Any]) -> float:
        """The time of one call on this rank."""
        self.ranks.synchronize()
        began = time.perf_counter()
        self.pictures = self.pipe(**call, generator=torch.Generator("cpu").manual_seed(0), return_dict=False)[0]
        self.ranks.synchronize()
        return time.perf_counter() - began

    def _apply(self, name: str, compiled: bool) -> None:
        transformer, ranks = self.pipe.transformer, self.ranks
        if name.startswith("ours"):
            if ranks.size > 1 and name != "ours-alone":
                degree = 1 if name == "ours-sequences" else None
                report = diffusers_attn.enable_context_parallel(self.pipe, guidance_degree=degree, verbose=False)
                self.result["note"] = str(report)
            else:
                diffusers_attn.set_attention_provider(self.pipe, "auto")
            if compiled:
                diffusers_attn.apply_compile(transformer)
            return
        if name != "diffusers":
            mesh = ranks.mesh(STRATEGIES[name])
            config = diffusers.ContextParallelConfig(ring_degree=mesh.size(0), ulysses_degree=mesh.size(1), mesh=mesh)
            # The backend of the same kernel as ours, since the default one cannot run over ranks.
            transformer.set_attention_backend("_native_cudnn" if ranks.device.type == "cuda" else "native")
            with diffusers_on_cpu() if ranks.device.type == "cpu" else contextlib.nullcontext():
                transformer.enable_parallelism(config=config)
        if compiled:
            transformer.compile_repeated_blocks()


def difference(pictures: list[Any], others: list[Any]) -> float:
    """The mean difference of two pictures or videos, in levels of 255."""
    one, other = (torch.tensor(np.asarray(each[0])).float() for each in (pictures, others))
    return (one - other).abs().mean().item() * (1 if one.max() > 1 else 255)


def markdown(report: dict[str, Any]) -> str:
    """The table of a run."""
    where = report["environment"]
    lines = [
        f"{report['results'][0]['pipeline']}, {heading(where)}",
        "",
        "| variant | seconds of a call | all calls | first call | kept by CUDA graphs |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        if "median_s" not in result:
            continue
        graphs = result["cuda_graphs"] or ""
        pool = graphs.partition("pool_mib=")[2].partition(",")[0]
        cells = [
            result["variant"],
            f"{result['median_s']:.2f}",
            ", ".join(f"{each:.2f}" for each in result["calls_s"]),
            f"{result['first_calls_s'][0]:.1f}",
            f"{pool} MiB" if pool else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def variants_of(size: int, guides: bool) -> list[str]:
    if guides and size > 1:
        return ["ours-alone", "diffusers-ring", "diffusers-ulysses", "ours-sequences", "ours"]
    if size == 1:
        return ["diffusers-eager", "ours-eager", "diffusers", "ours"]
    return ["diffusers-ring-eager", "ours-eager", "diffusers-ring", "diffusers-ulysses", "ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", choices=tuple(PIPELINES), default="flux", help="pipeline to measure (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of a call (default: %(default)s)")
    parser.add_argument(
        "--warm_up_steps", type=int, help="denoising steps of the first calls of each variant (default: as --steps)"
    )
    parser.add_argument("--variants", nargs="+", help="names of variants (default: all for this number of GPUs)")
    add_options(parser, rounds=4, timeout=600.0)
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # without torchrun
    for name, value in (single | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}).items():
        os.environ.setdefault(name, value)
    args = parse(parser, markdown, least=1)
    args.compile = True
    ranks = Ranks(args.device, args.timeout)
    report = Report(args.output, ranks, args)
    pipe, call = PIPELINES[args.pipeline](ranks.device, args.tiny)
    call["num_inference_steps"] = args.steps
    short = {**call, "num_inference_steps": args.warm_up_steps or args.steps}
    alone = Variant("diffusers-eager", pipe, ranks)
    alone.seconds(short)  # the result to compare others with

    ready: list[Variant] = []
    for name in args.variants or variants_of(ranks.size, args.pipeline != "flux"):
        variant = Variant(name, pipe, ranks)
        report.variants.append(variant)
        try:
            ranks.attempt(lambda variant=variant: variant.prepare(short))  # type: ignore[misc]
        except VariantError as error:
            variant.result["error"] = str(error)
        else:
            variant.result["difference_in_levels"] = round(difference(variant.pictures, alone.pictures), 3)
            ready.append(variant)
        report.write()
        if ranks.rank == 0:
            print(name, variant.result, flush=True)
    for turn in range(args.rounds):
        for variant in ready if turn % 2 == 0 else reversed(ready):
            variant.calls.append(max(ranks.gather(variant.seconds(call))))
            variant.result["calls_s"] = [round(each, 3) for each in variant.calls]
            variant.result["median_s"] = round(statistics.median(variant.calls), 3)
        report.write()
    if ranks.rank == 0:
        for variant in ready:
            print(f"{variant.name:24} {variant.result['median_s']:8.3f} s   {variant.result['calls_s']}")
        if ranks.device.type == "cuda":
            print(f"peak memory {torch.cuda.max_memory_allocated() / MIB:.0f} MiB")
    ranks.end(0)


if __name__ == "__main__":
    main()
