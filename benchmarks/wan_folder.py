"""What the trainer is given, made here and not downloaded: the folder of a Wan pipeline, and one of captioned videos.

All parts are of the real classes and save like any pipeline; weights are random. Of the real size are the transformer
and the VAE. The text encoder, which runs once per caption and not in a step, has the real one's output and two small
layers in place of 24; its tokenizer knows single characters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import real_shapes
import torch
import torch.nn.functional as F
import transformers
from real_shapes import RealModel, randomize

from tests.tiny_pipelines import pieces


class Size(NamedTuple):
    """Of the model, and of the videos."""

    transformer: RealModel
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    frames: int
    height: int
    width: int

    @property
    def settings(self) -> list[str]:
        """Arguments of the trainer that have it train on whole videos of this size."""
        side = round((self.height * self.width) ** 0.5)
        size = {"resolution": side, "aspects": self.width / self.height, "num_frames": self.frames}
        return [part for name, value in size.items() for part in (f"--{name}", f"{value}")]


REAL = Size(
    real_shapes.REAL["wan"],
    vae={},
    text_encoder={"d_model": 4096, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8},
    frames=81,
    height=480,
    width=832,
)
TINY = Size(
    real_shapes.TINY["wan"],
    vae={"base_dim": 8, "dim_mult": [1] * 4, "num_res_blocks": 1},
    text_encoder={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    frames=9,
    height=48,  # with this width 45 tokens, which do not divide among processes
    width=80,
)


def make_pipeline(size: Size, folder: Path, device: torch.device) -> Path:
    """A pipeline in `folder`, unless it is there already."""

    def write(unfinished: Path) -> None:
        tokenizer: Any = pieces()  # diffusers' signature has AutoTokenizer, which makes it
        config = transformers.UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **size.text_encoder)
        with torch.device(device):
            vae = diffusers.AutoencoderKLWan(**size.vae)
            text_encoder = transformers.UMT5EncoderModel(config)
        for model in (vae, text_encoder):
            randomize(model, device)
        diffusers.WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder.eval(),
            vae=vae.eval(),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
            ),
            transformer=size.transformer.make(device),
        ).save_pretrained(unfinished)

    return write_folder(folder, write)


def make_videos(size: Size, folder: Path, number: int) -> Path:
    """Videos in `folder`, unless they are there already: clouds of colours of their own that drift, at 16 frames a
    second; each with a caption beside it."""

    def write(unfinished: Path) -> None:
        unfinished.mkdir(parents=True)
        for i in range(number):
            coarse = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(i))
            clouds = F.interpolate(coarse, (size.height, size.width), mode="bicubic")[0].clamp(0, 1).mul(255).byte()
            _write_video(unfinished / f"{i}.mp4", clouds.permute(1, 2, 0).numpy(), size.frames, 2 * i + 1)
            (unfinished / f"{i}.txt").write_text(f"clouds number {i}, drifting" + " further" * i)

    return write_folder(folder, write)


def _write_video(path: Path, picture: np.ndarray, frames: int, speed: int) -> None:
    """A picture that moves by `speed` pixels a frame to the right, and comes in again on the left."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            moved = np.roll(picture, number * speed, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, there whole or not at all; what is there is kept."""
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        os.replace(unfinished, folder)
    return folder
