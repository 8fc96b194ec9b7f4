"""What providers and caches cost in quality and save in time, with the model that ships and its four captions.

    python benchmarks/quality.py --output results.json                 # on a CPU: exact providers and caches
    python benchmarks/quality.py --device cuda --output results.json   # on a GPU: lossy providers as well
    python benchmarks/quality.py --markdown results.json               # prints the table of a run

Every variant draws the same pictures from the same noise, and is compared with diffusers' own attention. Seconds are
those of the fastest of several passes; the table has them for GPUs, since the model is too small for a CPU's to say
anything about large models. Providers that are not usable here are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import print_tables
from versions import versions

from diffusers_attn import AttentionProviderError, compare_outputs, list_providers, set_attention_provider
from diffusers_attn.atomic_files import write_atomically
from diffusers_attn.providers.catalog import SPECS

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_flux"
SIZE = 64
REFERENCE = "diffusers' own attention"


class Variant(NamedTuple):
    """One way to draw the pictures."""

    name: str
    kind: str
    """"exact provider", "lossy provider" or "cache"."""
    provider: str | None = None
    cache: Callable[[Any], Any] | None = None
    """Makes the configuration of a cache of diffusers, given the pipeline."""


CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache, threshold 0.05": lambda pipe: FirstBlockCacheConfig(threshold=0.05),
    "FirstBlockCache, threshold 0.2": lambda pipe: FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer, every third step": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=3, max_order=1
    ),
    "PyramidAttentionBroadcast, every second step": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


def variants(cuda: bool) -> Iterator[Variant]:
    for status in list_providers():
        if status.available:
            exact = SPECS[status.name].capabilities.exact
            yield Variant(status.name, "exact provider" if exact else "lossy provider", status.name)
    for name, make in CACHES.items():
        yield Variant(name, "cache", "auto" if cuda else "native", make)


def captions() -> list[str]:
    return [json.loads(line)["text"] for line in (MODEL / "photos" / "metadata.jsonl").read_text().splitlines()]


def draw(pipe: Any, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """A picture for each caption, `[captions, height, width, 3]`, and the seconds of the fastest pass."""
    shortest, pictures = math.inf, None
    for _ in range(args.passes):
        began = time.perf_counter()
        pictures = pipe(
            captions(),
            height=SIZE,
            width=SIZE,
            num_inference_steps=args.steps,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="np",
        ).images
        shortest = min(shortest, time.perf_counter() - began)
    return np.asarray(pictures), shortest


def measure(args: argparse.Namespace) -> dict[str, Any]:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=getattr(torch, args.dtype), local_files_only=True).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    exact, seconds = draw(pipe, args)
    results: list[dict[str, Any]] = [{"variant": REFERENCE, "kind": "reference", "seconds": seconds}]
    chosen = [
        each
        for each in variants(args.device == "cuda")
        if not args.variants or each.name.startswith(tuple(args.variants))
    ]
    for each in chosen:
        transformer = pipe.transformer
        try:
            set_attention_provider(pipe, each.provider)
            if each.cache is not None:
                transformer.enable_cache(each.cache(pipe))
            pictures, seconds = draw(pipe, args)
        except AttentionProviderError as error:  # such as a head_dim that the kernel does not have
            results.append({"variant": each.name, "kind": each.kind, "refused": str(error)})
            print(f"{each.name}: refused: {error}", file=sys.stderr)
            continue
        finally:
            if transformer.is_cache_enabled:
                transformer.disable_cache()
            set_attention_provider(pipe, None)
        save = None if args.pictures is None else args.pictures / f"{each.name.replace(' ', '-').replace(',', '')}.png"
        found = compare_outputs(exact, pictures, save=save, names=(REFERENCE, each.name))
        results.append(
            {
                "variant": each.name,
                "kind": each.kind,
                "seconds": seconds,
                "psnr": found.psnr if math.isfinite(found.psnr) else None,
                "ssim": found.ssim,
                "lpips": found.lpips,
                "relative_error": found.relative_error,
                "max_difference": found.max_difference,
            }
        )
        print(f"{each.name}: {seconds:.2f} s; {found}", file=sys.stderr)
    environment = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "on": args.device,
        "dtype": args.dtype,
        "steps": args.steps,
        **versions(args.device, args.commit),
    }
    return {"environment": environment, "results": results}


def markdown(run: dict[str, Any]) -> str:
    """The table of a run."""
    where = run["environment"]
    timed = where["on"] != "cpu"
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    lines = [
        f"{where['device']}, {where['dtype']}, {where['steps']} steps; {packages}; {where['date']}, commit "
        f"{where['commit']}: `{where['command']}`",
        "",
        "| variant | | PSNR, dB | SSIM | LPIPS | relative error | largest difference, of 255 |" + " seconds |" * timed,
        "|---|---|---|---|---|---|---|" + "---|" * timed,
    ]
    for each in run["results"]:
        if "refused" in each:
            numbers = ["refused", "", "", "", ""]
        elif each["kind"] == "reference":
            numbers = [""] * 5
        else:
            numbers = [
                "equal" if each["psnr"] is None else f"{each['psnr']:.1f}",
                f"{each['ssim']:.4f}",
                "" if each["lpips"] is None else f"{each['lpips']:.4f}",
                f"{each['relative_error']:.1e}",
                f"{each['max_difference'] * 255:.3g}",
            ]
        numbers += [f"{each.get('seconds', 0.0):.2f}"] * timed
        lines.append(f"| {each['variant']} | {each['kind']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--steps", type=int, default=28, help="number of denoising steps (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=2, help="number of timed passes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="variants whose name begins with one of these (default: all)"
    )
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each comparison (default: none)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="RESULTS", help="print tables of earlier results")
    parser.add_argument("--commit", help="commit to record in the results (default: the one that git reports)")
    args = parser.parse_args()
    if args.markdown is not None:
        print_tables(args.markdown, markdown)
        return
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    run = measure(args)
    if args.output is not None:
        write_atomically(args.output, lambda path: path.write_text(json.dumps(run, indent=1) + "\n"))
    print(markdown(run), end="")


if __name__ == "__main__":
    main()
