#!/usr/bin/env python
"""Generate the same images with diffusers' own attention and with `diffusers_attn`, and compare them.

The model is `examples/tiny_flux`, a toy of 1.2 million parameters that has memorised four photographs. It is a genuine
`FluxPipeline` with the same code path as FLUX.

    python examples/quickstart.py
    python examples/quickstart.py --provider flash --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from diffusers_attn import AttentionProviderError, DispatchProcessor, compare_outputs

MODEL = Path(__file__).resolve().parent / "tiny_flux"
SIZE = 64  # pixels a side: the only size the toy has seen
TILE, HEADER = 4 * SIZE, 28  # on the sheet: a picture's side, and the line of text above it
OWN = "diffusers' own"


def known_captions() -> list[str]:
    """The captions of the four photographs that the model was trained on."""
    return [json.loads(line)["text"] for line in (MODEL / "photos" / "metadata.jsonl").read_text().splitlines()]


def load(device: str, dtype: torch.dtype) -> FluxPipeline:
    """Loads the pipeline without progress bars and warnings."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    return FluxPipeline.from_pretrained(MODEL, dtype=dtype, local_files_only=True).to(device)


def draw(pipe: FluxPipeline, label: str, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Generates an image per prompt. Returns `[prompt, height, width, 3]` in [0, 1], and the time in seconds."""

    def run(steps: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(args.seed)  # each pass starts from the same noise
        return pipe(
            args.prompt,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=generator,
            output_type="np",  # an array on the CPU, so the device has finished when the clock is read
        ).images

    pipe.set_progress_bar_config(disable=True)
    run(1)  # leaves one-time work, such as allocating memory, out of the time
    pipe.set_progress_bar_config(disable=False, desc=f"{label:<16}", ncols=80)
    began = time.perf_counter()
    pictures = run(args.steps)
    return pictures, time.perf_counter() - began


def contact_sheet(rows: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Image.Image:
    """A row of images for each label, enlarged four times, with a line of text above each."""
    sheet = Image.new("RGB", (TILE * len(prompts), (TILE + HEADER) * len(rows)), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (label, pictures) in enumerate(rows.items()):
        for column, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            corner = (column * TILE, row * (TILE + HEADER) + HEADER)
            tile = Image.fromarray((picture * 255).round().astype(np.uint8))
            sheet.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), corner)
            title = f"{textwrap.shorten(prompt, 18, placeholder='…')}, {label}"
            text.text((corner[0] + 6, corner[1] - HEADER // 2), title, fill="black", font=font, anchor="lm")
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Saves the image atomically: writes another file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        image.save(file, format="PNG")
    os.replace(file.name, path)


def compare(args: argparse.Namespace) -> None:
    """Runs both passes, prints the table and saves the sheet."""
    # A provider that is unknown or not installed is reported here, before any work is done.
    processor = DispatchProcessor(args.provider)

    pipe = load(args.device, getattr(torch, args.dtype))
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    threads = f" (threads: {torch.get_num_threads()})" if pipe.device.type == "cpu" else ""
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"model    FluxPipeline {MODEL.name}, {parameters / 1e6:.2f} M parameters: a toy that has memorised four")
    print("         photographs, on the code path of FLUX")
    print(f"device   {pipe.device}{threads}, {args.dtype}; {versions}")
    print(f"drawing  {len(args.prompt)} pictures of {SIZE} x {SIZE}, {args.steps} steps, seed {args.seed}")
    known = known_captions()
    if unknown := [prompt for prompt in args.prompt if prompt not in known]:
        print(f"note     the toy only knows {', '.join(map(repr, known))};")
        print(f"         expect a blend of those for {', '.join(map(repr, unknown))}")
    print(flush=True)

    pictures, seconds = {}, {}
    pictures[OWN], seconds[OWN] = draw(pipe, OWN, args)
    pipe.transformer.set_attn_processor(processor)
    pictures[args.provider], seconds[args.provider] = draw(pipe, args.provider, args)

    print(f"\n{'attention':<16} {'seconds':>8} {'per picture':>12}")
    for label, spent in seconds.items():
        print(f"{label:<16} {spent:8.2f} {spent / len(args.prompt):12.2f}")
    found = compare_outputs(pictures[OWN], pictures[args.provider], use_lpips=False)
    print(f"\nlargest difference  {found.max_difference:.1e} of a pixel's range; PSNR {found.psnr:.1f} dB")
    save(contact_sheet(pictures, args.prompt), args.output)
    print(f"saved               {args.output}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--provider", default="native", help="attention provider, or auto (default: %(default)s)")
    parser.add_argument("--prompt", action="append", help="prompt; may be repeated (default: the four known captions)")
    parser.add_argument("--steps", type=int, default=12, help="number of denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the models (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/quickstart.png"), help="output file (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: {args.steps}")
    args.prompt = args.prompt or known_captions()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        compare(args)
    except AttentionProviderError as error:
        raise SystemExit(f"quickstart.py: {error}") from None


if __name__ == "__main__":
    main()
