"""Milliseconds and memory of encoding and decoding a video or an image on several GPUs: every rank whole, and split.

    torchrun --nproc_per_node 2 benchmarks/vae.py --output results.json
    torchrun --nproc_per_node 2 benchmarks/vae.py --device cpu --tiny          # tries the script out
    python benchmarks/vae.py --markdown results.json                           # prints the table of a run

Models have the configuration of a published one and random weights. "whole" and "split" take turns in rounds, in
alternating order. A turn is one untimed call and several timed ones, which are queued without waiting in between. The
time of a call is that of its slowest rank; reported is the median of all calls of all rounds. Host time is the time
until a call returns, while the device still computes. Memory is the allocator's peak in a call beyond the weights and
the input, and the device memory used outside of the allocator since the start, such as NCCL's buffers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measuring import MIB, Report, memory_taken, profiled, step_milliseconds
from options import add_options, heading, parse
from ranks import Ranks, VariantError

from diffusers_attn import split_vae, unsplit_vae


class Model(NamedTuple):
    """A VAE, and the shape of its latents."""

    title: str
    make: Callable[[], Any]
    latents: tuple[int, ...]
    sample: tuple[int, ...]


def _wan(**config: Any) -> Any:
    return diffusers.AutoencoderKLWan(**config)


def _flux() -> Any:
    channels = (128, 256, 512, 512)
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


REAL = {
    "wan": Model("Wan 2.1 VAE, 480 x 832, 81 frames", _wan, (1, 16, 21, 60, 104), (1, 3, 81, 480, 832)),
    "wan-720p": Model("Wan 2.1 VAE, 720 x 1280, 81 frames", _wan, (1, 16, 21, 90, 160), (1, 3, 81, 720, 1280)),
    "hunyuan15": Model(
        "HunyuanVideo 1.5 VAE, 480 x 832, 33 frames", diffusers.AutoencoderKLHunyuanVideo15, (1, 32, 9, 30, 52),
        (1, 3, 33, 480, 832),
    ),
    "ltx2": Model(
        "LTX 2 VAE, 512 x 768, 121 frames", diffusers.AutoencoderKLLTX2Video, (1, 128, 16, 16, 24),
        (1, 3, 121, 512, 768),
    ),
    "cogvideox": Model(
        "CogVideoX VAE, 480 x 720, 49 frames",
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=16,
        ),
        (1, 16, 13, 60, 90), (1, 3, 49, 480, 720),
    ),
    "flux": Model("Flux VAE, 1024 x 1024", _flux, (1, 16, 128, 128), (1, 3, 1024, 1024)),
}  # fmt: skip
TINY = {
    "wan": Model(
        "tiny Wan VAE", lambda: _wan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), (1, 16, 2, 7, 4),
        (1, 3, 5, 56, 32),
    ),
}  # fmt: skip


class Variant:
    """A VAE, whole or split, in one direction, and its measurements."""

    def __init__(self, title: str, name: str, what: str, vae: Any, given: Tensor, ranks: Ranks) -> None:
        self.name, self.what, self.vae, self.given, self.ranks = name, what, vae, given, ranks
        self.result: dict[str, Any] = {"model": title, "call": what, "variant": name}
        self.calls: list[float] = []

    def call(self) -> Tensor:
        if self.what == "decode":
            return self.vae.decode(self.given, return_dict=False)[0]
        return self.vae.encode(self.given).latent_dist.mean

    def switch(self) -> None:
        unsplit_vae(self.vae)
        if self.name == "split":
            split_vae(self.vae)

    def measure(self, expected: Tensor | None, outside: int) -> Tensor:
        """Measures this rank's error, memory and host time, after a first call."""
        self.switch()
        out = self.call().float().cpu()
        own: dict[str, Any] = {"relative_error": 0.0}
        if expected is not None:
            own["relative_error"] = ((out - expected).norm() / expected.norm()).item()
        before = memory_taken(self.ranks.device)[0]
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        self.call()
        own["host_ms"] = round((time.perf_counter() - began) * 1e3, 1)
        if self.ranks.device.type == "cuda":
            self.ranks.synchronize()
            own["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / MIB)
            own["outside_allocator_mib"] = round((memory_taken(self.ranks.device)[1] - outside) / MIB)
        every = self.ranks.gather(own)
        self.result |= {key: [each[key] for each in every] for key in own}
        return out

    def turn(self, calls: int) -> None:
        """Times several calls, after an untimed one."""
        self.switch()
        self.ranks.gather(None)  # they start together
        own = self.ranks.attempt(lambda: step_milliseconds(self.call, calls, self.ranks.device))
        self.calls += [max(times) for times in zip(*own)]
        self.result |= {"ms": round(statistics.median(self.calls), 2), "calls": [round(ms, 2) for ms in self.calls]}


@torch.no_grad()
def bench(model: Model, args: argparse.Namespace, ranks: Ranks, report: Report) -> None:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    vae = model.make().to(ranks.device, dtype).eval()
    outside = memory_taken(ranks.device)[1]
    for what in args.calls:
        shape = model.latents if what == "decode" else model.sample
        given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(ranks.device, dtype)
        expected, ready = None, []
        for name in ("whole", "split"):
            variant = Variant(f"{model.title}, {args.dtype}", name, what, vae, given, ranks)
            report.variants.append(variant)
            try:
                out = ranks.attempt(lambda: variant.measure(expected, outside))[ranks.rank]  # noqa: B023
                expected = out if expected is None else expected
                ready.append(variant)
            except VariantError as failure:
                variant.result["error"] = str(failure)
        for turn in range(args.rounds):
            for variant in ready[:: 1 if turn % 2 == 0 else -1]:
                variant.turn(args.repeat)
            report.write()
        for variant in ready if args.profile and ranks.device.type == "cuda" else ():
            variant.switch()
            ranks.gather(None)
            variant.result["gpu"] = ranks.attempt(lambda: profiled(variant.call))[ranks.rank]  # noqa: B023
        report.write()
        for variant in ready if ranks.rank == 0 else ():
            print(_line(variant.result), file=sys.stderr, flush=True)
    unsplit_vae(vae)


def _line(result: dict[str, Any]) -> str:
    found = result.get("error") or f"{result['ms']:.1f} ms, memory {result.get('peak_mib')} MiB"
    return f"{result['model']}, {result['call']}, {result['variant']}: {found}"


def markdown(report: dict[str, Any]) -> str:
    """The results as a table."""
    where, results = report["environment"], report["results"]
    lines = [
        heading(where),
        "",
        "| model | call | | ms | of whole | host ms | peak MiB | of whole | relative difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole: dict[str, Any] = {}
    for result in results:
        if "error" in result:
            continue
        if result["variant"] == "whole":
            whole = result
        peak, outside = (max(result.get(key, [0])) for key in ("peak_mib", "outside_allocator_mib"))
        of_peak = f"{peak / max(whole['peak_mib']):.2f}" if peak else "-"
        lines.append(
            f"| {result['model']} | {result['call']} | {result['variant']} | {result['ms']:.1f} "
            f"| {result['ms'] / whole['ms']:.2f} | {max(result['host_ms']):.0f} "
            f"| {peak} + {outside} | {of_peak} | {max(result['relative_error']):.1e} |"
        )
    failed = [f"- {_line(result)}" for result in results if "error" in result]
    return "\n".join(lines + (["", "Failed:", "", *failed] if failed else [])) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=REAL, default=["wan"], help="models to run (default: wan)")
    parser.add_argument(
        "--calls", nargs="+", choices=("decode", "encode"), default=["decode"], help="calls to time (default: decode)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of weights (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=2, help="number of timed calls per turn (default: %(default)s)")
    parser.add_argument(
        "--profile", action="store_true", help="profile the GPU in one call of each variant as well (default: off)"
    )
    add_options(parser, rounds=3)
    args = parse(parser, markdown)
    args.compile = False
    return args


def main() -> None:
    args = parse_arguments()
    ranks = Ranks(args.device, args.timeout)
    report = Report(args.output, ranks, args)

    def measure() -> None:
        for name in args.models:
            bench((TINY if args.tiny else REAL)[name], args, ranks, report)

    ranks.run(measure, report, markdown)


if __name__ == "__main__":
    main()
