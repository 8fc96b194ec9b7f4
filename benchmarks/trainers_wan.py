"""Wan 2.1 1.3B, 480 x 832 and 81 frames: this trainer and musubi-tuner, with equal settings.

musubi-tuner (https://github.com/kohya-ss/musubi-tuner; a clone is needed, with its packages) trains on files in formats
of its own; `musubi_folder.py` makes them from the same weights, video and caption. Equal are: rank 16 on all linear
layers of the blocks, as by musubi-tuner's default; batch 1, bfloat16, gradient checkpointing, cached latents and texts,
AdamW, noise levels and clipping. All else is each one's default.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import wan_folder
from musubi_folder import make_files
from trainer_jobs import OURS, Comparison, Variant, arguments, ours

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def make(args: argparse.Namespace, folder: Path) -> None:
    """The pipeline, a video with its caption, and both as musubi-tuner reads them."""
    size = wan_folder.TINY if args.tiny else wan_folder.REAL
    device = torch.device(args.device)
    pipeline = wan_folder.make_pipeline(size, folder / "pipeline", device)
    videos = wan_folder.make_videos(size, folder / "videos", 1)
    if args.musubi is not None:
        make_files(pipeline, videos, size, folder / "musubi", device)


def command(variant: str, args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The script of a variant and its arguments, for files in `folder`."""
    if variant.startswith("ours"):
        size = wan_folder.TINY if args.tiny else wan_folder.REAL
        return [*ours(args, folder, output, {"data": folder / "videos"}), *size.settings, "--targets", *TARGETS]
    script = args.musubi / "src" / "musubi_tuner" / "wan_train_network.py"
    return [
        str(script),
        *arguments({
            "task": "t2v-1.3B", "dit": folder / "musubi" / "transformer.safetensors",
            "dataset_config": folder / "musubi" / "dataset.toml", "mixed_precision": "bf16",
            "network_module": "musubi_tuner.networks.lora_wan", "network_dim": args.rank, "network_alpha": args.rank,
            "optimizer_type": "AdamW", "optimizer_args": "weight_decay=0.01", "learning_rate": 1e-4,
            "lr_scheduler": "constant", "max_grad_norm": 1.0, "timestep_sampling": "shift",
            "discrete_flow_shift": 3.0,  # that of the pipeline's scheduler, which is this trainer's default
            "max_train_steps": args.steps, "seed": 0, "output_dir": output, "output_name": "adapter",
            "logging_dir": output / "logs", "log_with": "tensorboard",
        }),
        "--gradient_checkpointing",
    ]  # fmt: skip


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Variables for the processes of musubi-tuner."""
    return {"PYTHONPATH": os.fspath(args.musubi / "src")} if args.musubi else {}


WAN = Comparison(
    "Wan 1.3B 480p, 81 frames",
    {
        **OURS,
        "musubi-tuner, sdpa": Variant(["--sdpa"], needs="musubi"),
        "musubi-tuner, flash_attn": Variant(["--flash_attn"], needs="musubi"),
        "musubi-tuner, sdpa, compiled": Variant(["--sdpa", "--compile"], needs="musubi"),
        "musubi-tuner, flash_attn, compiled": Variant(["--flash_attn", "--compile"], needs="musubi"),
    },
    make,
    command,
    environment,
)
