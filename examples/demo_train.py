#!/usr/bin/env python
"""Train a LoRA on one photograph with the tiny Flux, and generate it before and after: make demo-train.

The LoRA is trained on a photograph with the caption "a flower", by the trainer of `examples/train_lora.py`, saved, and
loaded into a new pipeline with `load_lora_weights`. It overfits on purpose: the toy model of 1.2 million parameters
memorises the photograph, which comes with scikit-learn (by dany13, CC BY 2.0).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages

import diffusers
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from diffusers_attn.training import TrainConfig, Trainer

TINY = Path(__file__).resolve().parent / "tiny_flux"
CAPTION = "a flower"
SIZE = 64


def photograph(folder: Path) -> Path:
    """Makes a folder with the image and its caption, in the form of training data."""
    from sklearn.datasets import load_sample_image

    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(load_sample_image("flower.jpg"))
    left = (picture.width - picture.height) // 2
    square = picture.crop((left, 0, left + picture.height, picture.height))
    square.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / "flower.png")
    (folder / "flower.txt").write_text(CAPTION)
    return folder


def draw(adapter: Path | None) -> Image.Image:
    """Generates an image for the caption with a new pipeline, from fixed noise."""
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    return pipe(
        CAPTION,
        height=SIZE,
        width=SIZE,
        num_inference_steps=12,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def sheet(pictures: dict[str, Image.Image], path: Path) -> None:
    """Images side by side, enlarged four times, with a line of text above each."""
    side, head = 4 * SIZE, 24
    canvas = Image.new("RGB", (side * len(pictures), side + head), "white")
    for number, (title, picture) in enumerate(pictures.items()):
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (number * side, head))
        ImageDraw.Draw(canvas).text((number * side + 6, 6), title, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def likeness(picture: Image.Image, wanted: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB. Above 20, the image is recognisable."""
    one, other = (np.asarray(each.convert("RGB"), dtype=np.float64) / 255 for each in (picture, wanted))
    return float(-10 * np.log10(np.square(one - other).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="number of training steps (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo_train"), help="output folder (default: %(default)s)"
    )
    args = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()

    shutil.rmtree(args.output / "lora", ignore_errors=True)
    data = photograph(args.output / "photo")
    before = draw(None)
    config = TrainConfig(
        model=str(TINY),
        data=str(data),
        output_dir=str(args.output / "lora"),
        cpu=True,
        mixed_precision="no",
        resolution=[SIZE],
        aspects=[1.0],
        max_sequence_length=32,
        caption_dropout=0.0,
        gradient_checkpointing=False,
        rank=16,
        targets=[r".*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)"],
        steps=args.steps,
        learning_rate=3e-3,
        lr_schedule="cosine",
        lr_warmup_steps=min(10, args.steps),
        timestep_sampling="uniform",
        checkpoint_every=0,
        log_every=10,
    )
    began = time.perf_counter()
    adapter = Trainer(config).run()
    seconds = time.perf_counter() - began
    after = draw(adapter)
    wanted = Image.open(data / "flower.png")
    path = args.output / "before_after.png"
    sheet({"the photograph": wanted, f'"{CAPTION}" before': before, f'"{CAPTION}" after': after}, path)
    print(
        f"{args.steps} steps in {seconds:.0f} s; likeness to the photograph {likeness(before, wanted):.1f} dB before, "
        f"{likeness(after, wanted):.1f} dB after\n{path}"
    )
    if likeness(after, wanted) < likeness(before, wanted) + 3:
        sys.exit("demo_train.py: the adapter changed nothing; see the losses above.")


if __name__ == "__main__":
    main()
