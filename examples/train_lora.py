#!/usr/bin/env python
"""Train a LoRA for an image or video model, on one device or with each sequence shared by several.

    python examples/train_lora.py --recipe flux2-klein --data photos/ --output_dir lora/ --dry_run
    python examples/train_lora.py --model black-forest-labs/FLUX.1-dev --data photos/ --mixed_precision bf16
    accelerate launch --num_processes 4 examples/train_lora.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data my_videos/ --cp_degree 2 --attn_provider flash_4 --mixed_precision bf16 --output_dir lora/
    accelerate launch --config_file examples/accelerate_configs/fsdp2_cp2.yaml examples/train_lora.py ...
    torchrun --nproc_per_node 2 examples/train_lora.py --cpu ...    # CPUs; Accelerate: docs/context_parallel.md

--data is a folder of images or videos with captions: metadata.jsonl, .csv or .parquet (columns file_name, caption), or
a .txt file per image. Latents and text embeddings are computed once and cached. The run can be killed at any time and
resumed with --resume latest, also on another number of processes. `make demo-train` runs it with a toy model on a CPU.
"""

from __future__ import annotations

from diffusers_attn.training.program import run

if __name__ == "__main__":
    run("train_lora.py", __doc__.split("\n")[0])
