"""Flux 1024²: this trainer and diffusers' example script, with equal settings.

The script is `examples/dreambooth/train_dreambooth_lora_flux.py` of diffusers' repository, which is not part of the
package: rank 16 on the attention's projections, batch 1, bfloat16, gradient checkpointing, cached latents, AdamW, 512
text tokens, the same noise levels and clipping. All else is each one's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from flux_folder import CAPTION, make_images, make_pipeline
from trainer_jobs import OURS, Comparison, Variant, arguments, ours

LAYERS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
TEXT_TOKENS = 512
TINY_TEXT_TOKENS = 32


def make(args: argparse.Namespace, folder: Path) -> None:
    """The pipeline, and an image with and without a caption."""
    side = 64 if args.tiny else 1024
    make_pipeline(args.tiny, folder / "pipeline", torch.device(args.device))
    make_images(side, folder / "images", 1, captions=False)
    make_images(side, folder / "captioned", 1, captions=True)


def command(variant: str, args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The script of a variant and its arguments, for files in `folder`."""
    side, tokens = (64, TINY_TEXT_TOKENS) if args.tiny else (1024, TEXT_TOKENS)
    if variant.startswith("ours"):
        settings = {"data": folder / "captioned", "resolution": side, "aspects": 1, "guidance": 1.0}
        return ours(args, folder, output, {**settings, "max_sequence_length": tokens})
    return [
        str(args.diffusers_script),
        *arguments({
            "pretrained_model_name_or_path": folder / "pipeline", "instance_data_dir": folder / "images",
            "instance_prompt": CAPTION, "output_dir": output, "resolution": side, "train_batch_size": 1,
            "rank": args.rank, "lora_alpha": args.rank, "lora_layers": ",".join(f"attn.{each}" for each in LAYERS),
            "mixed_precision": "no" if args.tiny else "bf16", "max_train_steps": args.steps, "learning_rate": 1e-4,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "weighting_scheme": "logit_normal", "logit_mean": 0.0,
            "logit_std": 1.0, "guidance_scale": 1.0, "max_sequence_length": tokens, "optimizer": "adamw",
            "adam_weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 0,
        }),
        "--gradient_checkpointing", "--cache_latents",
    ]  # fmt: skip


# diffusers' default does not train Flux on Hopper with PyTorch 2.11 (docs/troubleshooting.md), so its other backends
# are here, too.
FLUX = Comparison(
    "Flux 1024²",
    {
        **OURS,
        "diffusers": Variant(needs="diffusers_script"),
        "diffusers, _native_flash": Variant(
            environment={"DIFFUSERS_ATTN_BACKEND": "_native_flash"}, needs="diffusers_script"
        ),
        "diffusers, flash": Variant(environment={"DIFFUSERS_ATTN_BACKEND": "flash"}, needs="diffusers_script"),
    },
    make,
    command,
)
