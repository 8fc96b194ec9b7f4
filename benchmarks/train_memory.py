"""Peak memory and seconds of a step of LoRA training, for each precision of the base model and place of its blocks.

    python benchmarks/train_memory.py --output train_memory.json            # Flux.1 dev at its real size
    python benchmarks/train_memory.py --layers 4 8 --output less.json       # with 4 + 8 of its 19 + 38 blocks
    python benchmarks/train_memory.py --tiny --device cpu                   # tries the script out
    python benchmarks/train_memory.py --markdown train_memory.json          # prints the table of a run

The transformer has the configuration of a real model and random weights, which are saved once to --scratch. Each
variant loads them in a process of its own, as the trainer does. A step is a forward and a backward pass of one image of
1024 x 1024 pixels with gradient checkpointing, and a step of the optimizer, in bfloat16 with the adapter in float32.
`peak_mib` counts tensors on the GPU from loading to the last step; `loading_mib` those until the first step. Losses of
one precision are the same for each place of its blocks. A variant that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measuring import MIB
from options import heading
from real_shapes import REAL, TINY, RealModel
from versions import installed, versions

from diffusers_attn.atomic_files import write_atomically
from diffusers_attn.training.base_precision import load_transformer
from diffusers_attn.training.choices import BASE_PRECISIONS, OFFLOADS
from diffusers_attn.training.families.flux import Flux
from diffusers_attn.training.lora import adapter_config, add_adapter
from diffusers_attn.training.offload import offload_blocks
from diffusers_attn.training.optim import make_optimizer

PACKAGES = ("torchao", "bitsandbytes", "peft", "accelerate")
RESULT = "result: "
"""Beginning of the line with which a variant's process prints its result."""


def real_model(tiny: bool, layers: list[int] | None) -> RealModel:
    """Flux, with fewer blocks if `layers` has their numbers: those with two streams, and those with one."""
    model = (TINY if tiny else REAL)["flux"]
    if layers is None:
        return model
    return dataclasses.replace(model, config={**model.config, "num_layers": layers[0], "num_single_layers": layers[1]})


def measure(
    real: RealModel, folder: Path, precision: str, offload: str, device: torch.device, steps: int, rank: int
) -> dict[str, Any]:
    """Trains a few steps in this process.

    Args:
        real: the model.
        folder: its weights, as `save_pretrained` writes them.
        precision: one of `BASE_PRECISIONS`.
        offload: one of `OFFLOADS`.
        device: device of the run.
        steps: number of timed steps; one more comes before.
        rank: rank of the adapter.
    """

    def peak() -> int:
        return round(torch.cuda.max_memory_allocated() / MIB) if device.type == "cuda" else 0

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    cls = getattr(diffusers, real.model_class)
    transformer: Any = load_transformer(
        folder, cls, model=str(folder), revision=None, dtype=torch.bfloat16, precision=precision
    )
    transformer.to("cpu")
    parameters = add_adapter(transformer, adapter_config("lora", rank, None, Flux.lora_targets), seed=0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as files:
        if offload == "none":
            transformer.to(device)
        else:
            offload_blocks(transformer, device, Path(files) if offload == "disk" else None)
        transformer.enable_gradient_checkpointing()
        transformer.train()
        optimizer = make_optimizer("adamw", parameters)
        inputs = real.inputs(device)
        loading, times, losses = peak(), [], []
        load_seconds = time.perf_counter() - began
        for _ in range(steps + 1):
            synchronize()
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = transformer(**inputs)[0].float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            synchronize()
            times.append(time.perf_counter() - began)
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"losses are not finite: {losses}")
    return {
        "seconds": round(statistics.median(times[1:]), 4),
        "steps": [round(each, 4) for each in times[1:]],
        "peak_mib": peak(),
        "loading_mib": loading,
        "load_seconds": round(load_seconds, 1),
        "loss": losses,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of a run."""
    lines = [heading(report["environment"]), "", "| base model | offload | peak, GiB | s/step |", "|---|---|---:|---:|"]
    for each in report["results"]:
        found = (
            f"| {each['peak_mib'] / 1024:.2f} | {each['seconds']:.3f} |"
            if "seconds" in each
            else f"| {each['error'].splitlines()[-1][:80]} | |"
        )
        lines.append(f"| {each['base_precision']} | {each['offload']} {found}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_precision", nargs="+", default=BASE_PRECISIONS, choices=BASE_PRECISIONS)
    parser.add_argument("--offload", nargs="+", default=OFFLOADS, choices=OFFLOADS)
    parser.add_argument("--layers", nargs=2, type=int, help="numbers of blocks (default: all)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a variant is ended")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for CPUs")
    parser.add_argument("--scratch", type=Path, help="folder for the weights (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit for the results, where there is no git")
    parser.add_argument("--markdown", type=Path, help="print the table of this file, and stop")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a variant, in its process
    args = parser.parse_args()
    if args.markdown is not None:
        print(markdown(json.loads(args.markdown.read_text())))
        return
    real, device = real_model(args.tiny, args.layers), torch.device(args.device)
    if args.one is not None:
        result = measure(real, args.scratch / "transformer", *args.one, device, args.steps, args.rank)
        print(RESULT + json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        folder = scratch / "transformer"
        if not folder.exists():
            torch.manual_seed(0)
            real.make(device).to("cpu", torch.bfloat16).save_pretrained(folder)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        report: dict[str, Any] = {
            "environment": {
                "command": " ".join([Path(sys.executable).name, *sys.argv]),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "model": real.title,
                "layers": args.layers,
                "ranks": 1,
                **versions(args.device, args.commit),
                "training_packages": installed(PACKAGES),
            },
            "results": [],
        }
        for precision, offload in itertools.product(args.base_precision, args.offload):
            found = _run(args, scratch, precision, offload)
            report["results"].append({"base_precision": precision, "offload": offload, **found})
            print(json.dumps(report["results"][-1]), file=sys.stderr, flush=True)
            if args.output is not None:
                text = json.dumps(report, indent=1) + "\n"
                write_atomically(args.output, lambda unfinished, text=text: unfinished.write_text(text))
    print(markdown(report))


def _run(args: argparse.Namespace, scratch: Path, precision: str, offload: str) -> dict[str, Any]:
    """Measures a variant in a process of its own. Returns its result, or its error."""
    command = [sys.executable, __file__, "--one", precision, offload, "--scratch", str(scratch)]
    command += ["--device", args.device, "--steps", str(args.steps), "--rank", str(args.rank)]
    command += ["--tiny"] if args.tiny else []
    command += ["--layers", *map(str, args.layers)] if args.layers else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"it took longer than {args.timeout:g} s"}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    return {"error": done.stderr.strip()[-2000:] or f"exit code {done.returncode}"}


if __name__ == "__main__":
    main()
