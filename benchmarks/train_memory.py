"""Peak memory and seconds of a step of LoRA training, for each precision of the base model and place of its blocks.

    python benchmarks/train_memory.py --output train_memory.json            # Flux.1 dev at its real size
    python benchmarks/train_memory.py --models qwen-image wan-14b-whole --output large.json
    python benchmarks/train_memory.py --layers 4 8 --output less.json       # with 4 + 8 of Flux's 19 + 38 blocks
    python benchmarks/train_memory.py --tiny --device cpu                   # tries the script out
    python benchmarks/train_memory.py --markdown train_memory.json          # prints the table of a run

The transformer has the configuration of a real model and random weights, which are saved to --scratch. Each variant
loads them in a process of its own, as the trainer does. A step is a forward and a backward pass of one image or video
with gradient checkpointing, and a step of the optimizer, in bfloat16 with the adapter in float32. `peak_mib` counts
tensors on the GPU from loading to the last step; `loading_mib` those until the first step; `reserved_mib` what the
allocator takes from the GPU, free blocks included. CUDA itself adds about half a GiB. With --vram, the allocator
fails beyond this memory, as it would on such a GPU. Losses of one precision are the same for each place of its
blocks. A variant that fails is recorded with its error. With --peft_casts, PEFT casts the inputs of LoRA, as in a plain
loop; the trainer leaves these casts out (`training/model/peft_casts.py`).
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
from functools import partial
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

from diffusers_attn import set_attention_provider
from diffusers_attn.atomic_files import write_atomically
from diffusers_attn.training.families.flux import Flux
from diffusers_attn.training.families.qwen_image import QwenImage
from diffusers_attn.training.families.wan import Wan
from diffusers_attn.training.model.base_precision import load_transformer
from diffusers_attn.training.model.lora import adapter_config, add_adapter
from diffusers_attn.training.model.offload import offload_blocks
from diffusers_attn.training.model.optim import make_optimizer
from diffusers_attn.training.model.peft_casts import castless_layers, without_casts
from diffusers_attn.training.settings.choices import BASE_PRECISIONS, OFFLOADS

PACKAGES = ("torchao", "bitsandbytes", "peft", "accelerate")
MODELS = {"flux": Flux, "qwen-image": QwenImage, "wan": Wan, "wan-14b-whole": Wan}
"""Models of `real_shapes`, with the family that names the layers of the adapter."""
RESULT = "result: "
"""Beginning of the line with which a variant's process prints its result."""


def real_model(name: str, tiny: bool, layers: list[int] | None) -> RealModel:
    """A model, with fewer blocks if `layers` has their number, or numbers (Flux: those with two streams, with one)."""
    model = (TINY if tiny else REAL)[name]
    keys = [key for key in ("num_layers", "num_single_layers") if key in model.config]
    if layers is None:
        return model
    if len(layers) != len(keys):
        raise SystemExit(f"--layers: {name} needs {len(keys)} ({', '.join(keys)}), got {len(layers)}")
    return dataclasses.replace(model, config={**model.config, **dict(zip(keys, layers, strict=True))})


def measure(
    real: RealModel,
    targets: tuple[str, ...],
    folder: Path,
    precision: str,
    offload: str,
    device: torch.device,
    steps: int,
    rank: int,
    peft_casts: bool = False,
) -> dict[str, Any]:
    """Trains a few steps in this process.

    Args:
        real: the model.
        targets: names of the layers that the adapter is for.
        folder: its weights, as `save_pretrained` writes them.
        precision: one of `BASE_PRECISIONS`.
        offload: one of `OFFLOADS`.
        device: device of the run.
        steps: number of timed steps; one more comes before.
        rank: rank of the adapter.
        peft_casts: whether PEFT casts the inputs of LoRA.
    """

    def peak(read: Any = torch.cuda.max_memory_allocated) -> int:
        return round(read() / MIB) if device.type == "cuda" else 0

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    cls = getattr(diffusers, real.model_class)
    transformer: Any = load_transformer(
        folder, cls, model=str(folder), part="transformer", revision=None, dtype=torch.bfloat16, precision=precision
    )
    transformer.to("cpu")
    parameters = add_adapter(transformer, adapter_config("lora", rank, None, targets), seed=0)
    set_attention_provider(transformer, "auto")  # as the trainer does
    layers = [] if peft_casts else castless_layers(transformer)
    with tempfile.TemporaryDirectory(dir=folder.parent) as files, without_casts(layers):
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
        "reserved_mib": peak(torch.cuda.max_memory_reserved),
        "load_seconds": round(load_seconds, 1),
        "loss": losses,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of a run."""
    lines = [heading(report["environment"]), ""]
    lines += ["| model | base model | offload | peak, GiB | reserved, GiB | s/step |", "|---|---|---|---:|---:|---:|"]
    for each in report["results"]:
        found = (
            f"| {each['peak_mib'] / 1024:.1f} | {each['reserved_mib'] / 1024:.1f} | {each['seconds']:.2f} |"
            if "seconds" in each
            else f"| {each['error'].splitlines()[-1][:80]} | | |"
        )
        lines.append(f"| {each['model']} | {each['base_precision']} | {each['offload']} {found}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["flux"], choices=MODELS)
    parser.add_argument("--base_precision", nargs="+", default=BASE_PRECISIONS, choices=BASE_PRECISIONS)
    parser.add_argument("--offload", nargs="+", default=OFFLOADS, choices=OFFLOADS)
    parser.add_argument("--layers", nargs="+", type=int, help="number of blocks (default: all)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--peft_casts", action="store_true", help="let PEFT cast the inputs of LoRA")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--vram", type=float, help="GiB of the GPU that the allocator may take (default: all)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a variant is ended")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models for CPUs")
    parser.add_argument("--scratch", type=Path, help="folder for the weights (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--commit", help="commit for the results, where there is no git")
    parser.add_argument("--markdown", type=Path, help="print the table of this file, and stop")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a variant, in its process
    args = parser.parse_args()
    if args.markdown is not None:
        print(markdown(json.loads(args.markdown.read_text())))
        return
    if args.one is not None:
        _one(args)
        return
    report: dict[str, Any] = {
        "environment": {
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "layers": args.layers,
            "ranks": 1,
            **versions(args.device, args.commit),
            "training_packages": installed(PACKAGES),
        },
        "results": [],
    }
    for name in args.models:
        real = real_model(name, args.tiny, args.layers)
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            _save(real, Path(scratch) / "transformer", torch.device(args.device))
            for precision, offload in itertools.product(args.base_precision, args.offload):
                found = {"model": real.title, "base_precision": precision, "offload": offload}
                found |= _run(args, name, scratch, precision, offload)
                report["results"].append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
                if args.output is not None:
                    text = json.dumps(report, indent=1) + "\n"
                    write_atomically(args.output, partial(Path.write_text, data=text))
    print(markdown(report))


def _save(real: RealModel, folder: Path, device: torch.device) -> None:
    """Writes a model's random weights in bfloat16."""
    torch.manual_seed(0)
    model = real.make(device)
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one(args: argparse.Namespace) -> None:
    """Measures the variant of --one, and prints its result."""
    name, precision, offload = args.one
    device = torch.device(args.device)
    if args.vram is not None and device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.vram * 1024 * MIB / capacity))
    real, folder = real_model(name, args.tiny, args.layers), args.scratch / "transformer"
    targets = MODELS[name].lora_targets
    result = measure(real, targets, folder, precision, offload, device, args.steps, args.rank, args.peft_casts)
    print(RESULT + json.dumps(result), flush=True)


def _run(args: argparse.Namespace, name: str, scratch: str, precision: str, offload: str) -> dict[str, Any]:
    """Measures a variant in a process of its own. Returns its result, or its error."""
    command = [sys.executable, __file__, "--one", name, precision, offload, "--scratch", scratch]
    command += ["--device", args.device, "--steps", str(args.steps), "--rank", str(args.rank)]
    command += ["--tiny"] if args.tiny else []
    command += ["--peft_casts"] if args.peft_casts else []
    command += [] if args.vram is None else ["--vram", str(args.vram)]
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
