"""Seconds from the start of Python to the first picture of a compiled `FluxPipeline`, with a cold and a warm cache.

    python benchmarks/first_picture.py --output first_picture.json
    python benchmarks/first_picture.py --device cpu --tiny          # tries the script out

Each run is a new process, with PyTorch's compile cache in a folder that is empty for the first run ("cold") and full
for the next ones ("warm"). "diffusers" compiles by `compile_repeated_blocks`, "ours" by `set_attention_provider` and
`apply_compile`, and "ours-eager" compiles nothing. A run's time has parts: imports, making the pipeline (random weights
of the real size), and the first call with `--steps` steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
VARIANTS = "ours-eager", "diffusers", "ours"
HITS = "fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"


def first_picture(variant: str, device: str, tiny: bool, steps: int, began: float) -> dict[str, Any]:
    """Draws one picture in this process. Returns the seconds of each part."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from real_pipelines import PIPELINES

    import diffusers_attn

    imported = time.time()
    pipe, call = PIPELINES["flux"](torch.device(device), tiny)
    pipe.set_progress_bar_config(disable=True)
    made = time.time()
    if variant.startswith("ours"):
        diffusers_attn.set_attention_provider(pipe, "auto")
    if variant == "ours":
        diffusers_attn.apply_compile(pipe.transformer)
    if variant == "diffusers":
        pipe.transformer.compile_repeated_blocks()
    pipe(**call, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0))
    drawn = time.time()
    counts = torch._dynamo.utils.counters["inductor"]
    parts = {"import_s": imported - began, "make_s": made - imported, "call_s": drawn - made, "total_s": drawn - began}
    return {name: round(each, 2) for name, each in parts.items()} | {name: counts[name] for name in HITS}


def markdown(report: dict[str, Any]) -> str:
    """The table of a run."""
    where = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    lines = [
        f"{where['device']}; {packages}; {where['date']}, commit {where['commit']}: `{where['command']}`",
        "",
        "| variant | compile cache | imports | making the pipeline | first call | all, in seconds |",
        "|---|---|---|---|---|---|",
    ]
    for each in report["results"]:
        seconds = " | ".join(f"{each[name]:.1f}" for name in ("import_s", "make_s", "call_s", "total_s"))
        lines.append(f"| {each['variant']} | {each['cache']} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and a picture that run quickly on a CPU")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the picture (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="what to run (default: all)")
    parser.add_argument("--warm", type=int, default=2, help="runs with a warm cache (default: %(default)s)")
    parser.add_argument("--commit", help="the commit that is measured, if this is no git repository")
    parser.add_argument("--output", type=Path, help="file of results, JSON")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
    if args.run:
        print(json.dumps(first_picture(args.run[0], args.device, args.tiny, args.steps, float(args.run[1]))))
        return
    results = []
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", *["warm"] * args.warm):
                options = ["--device", args.device, "--steps", str(args.steps), *["--tiny"] * args.tiny]
                child = subprocess.run(
                    [sys.executable, __file__, *options, "--run", variant, str(time.time())],
                    env=os.environ | {name: str(Path(folder, name)) for name in CACHES},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                results.append({"variant": variant, "cache": cache, **json.loads(child.stdout.splitlines()[-1])})
                print(results[-1], flush=True)
    if args.output:
        from versions import versions

        command = " ".join([Path(sys.executable).name, *sys.argv])
        environment = {
            "command": command,
            "date": datetime.date.today().isoformat(),
            **versions(args.device, args.commit),
        }
        args.output.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
