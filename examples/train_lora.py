#!/usr/bin/env python
"""Train a LoRA for Flux, Wan, CogVideoX or CogView4, on one device or with each sequence shared by several.

    python examples/train_lora.py --model black-forest-labs/FLUX.1-dev --data photos/ --mixed_precision bf16
    accelerate launch --num_processes 4 examples/train_lora.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data my_videos/ --cp_degree 2 --attn_provider flash_4 --mixed_precision bf16 --output_dir lora/
    accelerate launch --config_file examples/accelerate_configs/fsdp2_cp2.yaml examples/train_lora.py ...
    torchrun --nproc_per_node 2 examples/train_lora.py --cpu ...    # CPUs; or as in the README, with Accelerate

--data is a folder of images or videos with captions: metadata.jsonl, .csv or .parquet (columns file_name, caption), or
a .txt file per image. Latents and text embeddings are computed once and cached. The run can be killed at any time and
resumed with --resume latest, also on another number of processes. `make demo-train` runs it with a toy model on a CPU.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages

import diffusers
import transformers

from diffusers_attn.training import TrainConfig, Trainer
from diffusers_attn.training.commandline import log_warnings, report
from diffusers_attn.training.errors import TrainingInterrupted


def main() -> None:
    log_warnings()
    config = TrainConfig.from_arguments(description=__doc__.split("\n")[0])
    if os.environ.get("RANK", "0") != "0":  # only rank 0 shows progress bars
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    trainer = Trainer(config)
    path = trainer.run()
    if trainer.main:
        print(f"saved {path}", flush=True)


def leave(code: int) -> None:
    """Ends the process without destroying process groups. After a failure, other processes may be waiting in a
    collective; after success, gloo's threads may abort a process that destroys its groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        main()
    except TrainingInterrupted as interruption:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_lora.py: {interruption}", file=sys.stderr)
        leave(interruption.exit_code)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("train_lora.py: interrupted before training began, or after its end.", file=sys.stderr)
        leave(130)
    except Exception as error:
        report(error, "train_lora.py")
        if several:
            leave(1)
        sys.exit(1)
    if several:
        import torch.distributed as dist

        dist.barrier()
        leave(0)
