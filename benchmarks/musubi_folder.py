"""What musubi-tuner is given to train Wan: weights, cached latents and texts, and the list of datasets.

All of it is made from the folders of `wan_folder.py`, so that it trains the same model on the same data. Names of
weights are those of Wan's own repository, and files of the cache have the form that its README describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_folder import Size, write_folder

from diffusers_attn.training.data.decode import read_video
from diffusers_attn.training.data.source import FileSource

NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
}
"""Parts of diffusers' names of weights, and those of Wan's repository."""


def make_files(pipeline: Path, videos: Path, size: Size, folder: Path, device: torch.device) -> Path:
    """The files in `folder`, unless they are there already."""

    def write(unfinished: Path) -> None:
        cache = unfinished / "cache"
        cache.mkdir(parents=True)
        pipe: Any = diffusers.WanPipeline.from_pretrained(pipeline, torch_dtype=torch.bfloat16)
        save_file(_renamed(pipe.transformer), unfinished / "transformer.safetensors")
        pipe.transformer = None
        pipe.to(device)
        video = next(videos.glob("*.mp4"))
        latents = _latents(pipe, video, size)
        prompt = video.with_suffix(".txt").read_text()
        text = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
        length = int(text.abs().sum(-1).count_nonzero())  # the rest is padding
        frames, height, width = latents.shape[1:]
        shape = f"{size.width:04}x{size.height:04}"
        latent = {f"latents_{frames}x{height}x{width}_bfloat16": latents}
        save_file(latent, cache / f"video_00000-{size.frames:03}_{shape}_wan.safetensors")
        save_file({"varlen_t5_bfloat16": text[:length].cpu().contiguous()}, cache / "video_wan_te.safetensors")
        (unfinished / "dataset.toml").write_text(
            f"[general]\nresolution = [{size.width}, {size.height}]\nbatch_size = 1\n"
            f'[[datasets]]\nvideo_directory = "{videos}"\ncaption_extension = ".txt"\n'
            f'cache_directory = "{folder / "cache"}"\ntarget_frames = [{size.frames}]\n'
        )

    return write_folder(folder, write)


def _renamed(transformer: Any) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in transformer.state_dict().items():
        for part, original in NAMES.items():
            name = f".{name}".replace(f".{part}.", f".{original}.")[1:]
        modulation = "modulation" if name.startswith("blocks.") else "head.modulation"
        renamed[name.replace("scale_shift_table", modulation)] = weight.contiguous()
    return renamed


def _latents(pipe: Any, video: Path, size: Size) -> Tensor:
    """Normalised latents of a video, of shape (channels, frames, height, width)."""
    frames = torch.stack(list(read_video(FileSource(video), range(size.frames))), dim=1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(frames.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    config = pipe.vae.config
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1).to(latents) for each in (config.latents_mean, config.latents_std)
    )
    return ((latents - mean) / std)[0].bfloat16().cpu().contiguous()
