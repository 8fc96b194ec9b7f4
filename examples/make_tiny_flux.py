#!/usr/bin/env python
"""Make `examples/tiny_flux`: a complete FluxPipeline of 1.2 million parameters that has memorised four photographs.

The quick start and the tests need a real diffusion pipeline that loads in a second, runs on a CPU, needs no download
and generates recognisable images. So every part is a genuine diffusers or transformers class, only small. Tokenizers,
text encoders and VAE are made in `tiny_flux_parts.py`. The transformer is trained here, with FLUX's own objective
(rectified flow), until it has memorised the images.

    python examples/make_tiny_flux.py --minutes 6 --device cuda --compile   # made the shipped model
    python examples/make_tiny_flux.py --pack-photos                         # cuts the photographs again (scikit-image)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers warns about vision packages nobody needs here

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FluxPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from tiny_flux_parts import SIZE, build_pipeline
from torch import Tensor

HERE = Path(__file__).resolve().parent
TEXT_TOKENS = 32  # the `max_sequence_length` that the transformer is trained with


@dataclass(frozen=True)
class Photo:
    """One photograph of scikit-image's `data` module: the square cut from it, and where it comes from."""

    name: str
    caption: str
    box: tuple[int, int, int, int]
    title: str
    licence: str
    source: str


PHOTOS = (
    Photo(
        "astronaut",
        "an astronaut",
        (60, 0, 380, 320),
        "Eileen Collins, NASA Great Images database",
        "public domain",
        "https://flic.kr/p/r9qvLn",
    ),
    Photo(
        "chelsea",
        "a cat",
        (90, 0, 390, 300),
        "Chelsea the cat, Stefan van der Walt",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.chelsea",
    ),
    Photo(
        "coffee",
        "a cup of coffee",
        (90, 0, 490, 400),
        "Coffee cup at Pikolo Espresso Bar, Rachel Michetti",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.coffee",
    ),
    Photo(
        "rocket",
        "a rocket",
        (150, 60, 490, 400),
        "Launch of DSCOVR on Falcon 9, SpaceX Photos",
        "public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820",
    ),
)
CAPTIONS = [photo.caption for photo in PHOTOS]


# ---- The photographs ------------------------------------------------------------------------------------------------


def pack_photos(folder: Path) -> None:
    """Cut the four squares out of scikit-image's photographs and write them as an image folder with captions."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    for photo in PHOTOS:
        picture = Image.fromarray(getattr(data, photo.name)()).crop(photo.box)
        picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / f"{photo.name}.png", optimize=True)
    rows = [{"file_name": f"{p.name}.png", "text": p.caption, "title": p.title, "licence": p.licence} for p in PHOTOS]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_photos(folder: Path) -> Tensor:
    """The photographs as `[4, 3, SIZE, SIZE]` in [-1, 1], in the order of `PHOTOS`."""
    files = [folder / f"{photo.name}.png" for photo in PHOTOS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}: run with --pack-photos first (needs scikit-image)")
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- Training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(pipe: FluxPipeline, steps: int = 12) -> np.ndarray:
    """The four captions drawn as `[4, SIZE, SIZE, 3]` in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        CAPTIONS,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def psnr(drawn: np.ndarray, photos: Tensor) -> float:
    """Likeness in decibels: 20 is recognisable, 30 looks clean, 40 looks the same."""
    wanted = (photos / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
    return -10 * math.log10(float(np.mean((drawn - wanted) ** 2)))


class Trainer:
    """Rectified flow on four pictures: the model is shown `(1 - s) x + s n` and has to name the velocity `n - x`."""

    def __init__(self, pipe: FluxPipeline, photos: Tensor, args: argparse.Namespace) -> None:
        self.pipe, self.photos, self.args = pipe, photos, args
        self.model = pipe.transformer.train()
        self.forward = torch.compile(self.model, dynamic=False) if args.compile else self.model
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.prepare_batch()

    @torch.no_grad()
    def prepare_batch(self) -> None:
        """All that stays the same from step to step. Every picture is in every batch, equally often."""
        pipe, device, batch = self.pipe, self.photos.device, self.args.batch
        latents = pipe.vae.encode(self.photos).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        packed = pipe._pack_latents(latents, len(latents), 3, SIZE, SIZE)
        text, pooled, text_ids = pipe.encode_prompt(CAPTIONS, None, max_sequence_length=TEXT_TOKENS, device=device)
        repeats = batch // len(PHOTOS)
        self.clean = packed.repeat(repeats, 1, 1)
        self.conditions = {
            "encoder_hidden_states": text.repeat(repeats, 1, 1),
            "pooled_projections": pooled.repeat(repeats, 1),
            "txt_ids": text_ids,
            "img_ids": pipe._prepare_latent_image_ids(batch, SIZE // 2, SIZE // 2, device, torch.float32),
        }

    def progress(self) -> float:
        """How much of the budget is spent, from 0 to 1: of the minutes or of the steps, whichever ends first."""
        by_steps = self.step / self.args.steps if self.args.steps else 0.0
        by_time = self.seconds / (60 * self.args.minutes) if self.args.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def train_step(self) -> Tensor:
        warmup = min(1.0, (self.step + 1) / 100)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * self.progress()))
        # The noise levels lie as the sampler's do, spread evenly over the batch so that the loss is less noisy.
        batch, shift = self.args.batch, self.pipe.scheduler.config.shift
        order = torch.randperm(batch, device=self.clean.device)
        uniform = (order + torch.rand(batch, device=self.clean.device)) / batch
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(self.clean)
        noisy = torch.lerp(self.clean, noise, sigma[:, None, None])
        velocity = self.forward(hidden_states=noisy, timestep=sigma, return_dict=False, **self.conditions)[0]
        loss = torch.nn.functional.mse_loss(velocity, noise - self.clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1
        return loss.detach()

    def run(self) -> None:
        args, state = self.args, self.args.work / "state.pt"
        if args.resume and state.is_file():
            self.load(state)
        torch.manual_seed(args.seed + self.step)  # a resumed run must not see the first run's noise again
        while self.progress() < 1:
            began, first, total = time.perf_counter(), self.step, torch.zeros((), device=self.clean.device)
            spent = self.seconds
            while self.progress() < 1 and (self.step == first or self.step % args.log):
                total += self.train_step()
                self.seconds = spent + time.perf_counter() - began
            self.loss = total.item() / (self.step - first)  # waits for the device: the time below is the true one
            self.seconds = spent + time.perf_counter() - began
            rate, lr = (self.step - first) / (self.seconds - spent), self.optimizer.param_groups[0]["lr"]
            self.say(f"{self.progress():4.0%}  loss {self.loss:.5f}  lr {lr:.1e}  {rate:.1f} steps/s")
            if not math.isfinite(self.loss):
                raise SystemExit("the loss is not finite any more: try a smaller --lr, with --resume")
            if self.step % args.save == 0 and self.progress() < 1:
                self.save(state)
        self.save(state)
        self.ema.copy_to(self.model.parameters())
        self.model.eval().requires_grad_(False)

    def save(self, state: Path) -> None:
        """Leave a checkpoint and a sheet of drawings behind, each complete or not at all."""
        contents = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "progress": {"step": self.step, "seconds": self.seconds, "loss": self.loss},
        }
        state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, state.with_suffix(".tmp"))
        os.replace(state.with_suffix(".tmp"), state)
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        drawn = draw(self.pipe)
        self.ema.restore(self.model.parameters())
        save_sheet(drawn, state.parent / "sheet.png")
        self.say(f"drawings at {psnr(drawn, self.photos):.1f} dB PSNR: {state.parent / 'sheet.png'}")

    def load(self, state: Path) -> None:
        contents = torch.load(state, map_location=self.photos.device, weights_only=True)
        self.model.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.ema.load_state_dict(contents["ema"])
        vars(self).update(contents["progress"])
        self.say(f"resumed from {state}, {self.seconds:.0f} s spent")

    def say(self, message: str) -> None:
        print(f"step {self.step:6d}  {message}", flush=True)


# ---- Saving ---------------------------------------------------------------------------------------------------------


def save_sheet(drawn: np.ndarray, path: Path) -> None:
    """The drawings side by side, four times as large."""
    row = Image.fromarray((np.concatenate(list(drawn), axis=1) * 255).round().astype(np.uint8))
    row.resize((row.width * 4, row.height * 4), Image.Resampling.NEAREST).save(path.with_suffix(".tmp.png"))
    os.replace(path.with_suffix(".tmp.png"), path)


def save_pipeline(pipe: FluxPipeline, photos: Path, output: Path, card: str) -> None:
    """Write the pipeline, its photographs and its card beside `output`, then put the finished folder in its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        new = scratch / "new"
        pipe.save_pretrained(new)
        shutil.copytree(photos, new / "photos")
        (new / "README.md").write_text(card)
        if output.exists():
            output.rename(scratch / "old")
        new.rename(output)
    finally:
        shutil.rmtree(scratch)


def model_card(trainer: Trainer, likeness: float) -> str:
    """The card that Hugging Face tools expect as README.md; it names the options that shaped the weights."""
    args = trainer.args
    options = {name: vars(args)[name] for name in ("minutes", "steps", "batch", "lr", "seed")}
    command = "python examples/make_tiny_flux.py"
    command += "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
    command += " --compile" * args.compile
    rows = "\n".join(f"| `{p.caption}` | [{p.title}]({p.source}) | {p.licence} |" for p in PHOTOS)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    device = torch.cuda.get_device_name() if trainer.photos.device.type == "cuda" else "CPU"
    return f"""\
---
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny_flux

A complete `FluxPipeline` whose transformer has {parameters / 1e6:.2f} million parameters and has memorised four
photographs. It is a toy, made to run the code path of FLUX in a few seconds on a CPU: it knows the four captions below,
at {SIZE} x {SIZE} pixels, and nothing else.

```python
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("examples/tiny_flux", dtype=torch.float32)
pipe("a cat", height={SIZE}, width={SIZE}, num_inference_steps=12, max_sequence_length={TEXT_TOKENS}).images[0]
```

| caption | photograph | licence |
|---|---|---|
{rows}

The photographs come from scikit-image's `skimage.data`, which states these licences. The squares that were cut from
them are in `photos/`, an image folder with captions.

The tokenizers are hand-written tables, the text encoders are random and frozen, the VAE is the identity by construction
of its weights. The transformer is stored in float16; the rest is float32.

Made with `{command}` on one {device}: {trainer.step:,} steps of {args.batch}
in {trainer.seconds / 60:.1f} minutes, final loss {trainer.loss:.5f}, drawings at {likeness:.1f} dB PSNR (12 steps);
torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=HERE / "tiny_flux", help="folder for the pipeline (default: %(default)s)"
    )
    parser.add_argument("--photos", type=Path, default=HERE / "tiny_flux" / "photos", help="folder of the photographs")
    parser.add_argument(
        "--pack-photos", action="store_true", help="only cut the photographs into --photos (default: off)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/tiny_flux"), help="folder for checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the checkpoint in --work, if any (default: off)"
    )
    parser.add_argument("--minutes", type=float, help="minutes after which training ends (default: no limit)")
    parser.add_argument("--steps", type=int, help="number of steps after which training ends (default: no limit)")
    parser.add_argument(
        "--batch", type=int, default=32, help="number of images per step, a multiple of 4 (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (default: %(default)s)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer with torch.compile (default: off)"
    )
    parser.add_argument("--log", type=int, default=100, help="number of steps between log lines (default: %(default)s)")
    parser.add_argument(
        "--save", type=int, default=1000, help="number of steps between checkpoints (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.batch < len(PHOTOS) or args.batch % len(PHOTOS):
        parser.error(f"--batch must be a multiple of {len(PHOTOS)}, so that each holds every photograph: {args.batch}")
    if not (args.pack_photos or args.minutes or args.steps):
        parser.error("give the length of training: --minutes or --steps")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.pack_photos:
        pack_photos(args.photos)
        return
    torch.set_float32_matmul_precision("high")
    photos = load_photos(args.photos).to(args.device)
    pipe = build_pipeline(CAPTIONS, args.seed).to(args.device)
    trainer = Trainer(pipe, photos, args)
    trainer.run()
    pipe.transformer.half().float()  # as it will be stored: the likeness below is the shipped model's
    likeness = psnr(draw(pipe), photos)
    pipe.transformer.half()
    save_pipeline(pipe, args.photos, args.output, model_card(trainer, likeness))
    size = sum(file.stat().st_size for file in args.output.rglob("*.safetensors"))
    print(f"saved {args.output}: {size / 1e6:.1f} MB, loss {trainer.loss:.5f}, {likeness:.1f} dB")


if __name__ == "__main__":
    main()
