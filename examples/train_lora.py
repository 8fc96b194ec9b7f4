#!/usr/bin/env python
"""Train a LoRA for Flux, Wan, CogVideoX or CogView4, on one device or on several that share each sequence.

    python examples/train_lora.py --model black-forest-labs/FLUX.1-dev --data photos/ --mixed_precision bf16
    accelerate launch --num_processes 4 examples/train_lora.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data my_videos/ --cp_degree 2 --attn_provider flash_4 --mixed_precision bf16 --output_dir lora/
    accelerate launch --config_file examples/accelerate_configs/fsdp2_cp2.yaml examples/train_lora.py ...
    torchrun --nproc_per_node 2 examples/train_lora.py --cpu ...    # CPUs; or as in the README, with Accelerate

--data is a folder with captions: metadata.jsonl, .csv or .parquet (file_name, caption), or a .txt beside each file.
What text encoders and VAE make of it is computed once. The run can be killed at any time and goes on with --resume
latest, also on another number of processes. `make demo-train` shows it with a toy on a CPU.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice about vision packages is of no use here

import diffusers
import transformers

from diffusers_attn.training import TrainConfig, Trainer
from diffusers_attn.training.commandline import log_in_words, report
from diffusers_attn.training.errors import TrainingInterrupted


def main() -> None:
    log_in_words()
    config = TrainConfig.from_arguments(description=__doc__.split("\n")[0])
    if os.environ.get("RANK", "0") != "0":  # one process's bars are enough
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    trainer = Trainer(config)
    path = trainer.run()
    if trainer.main:
        print(f"saved {path}", flush=True)


def leave(code: int) -> None:
    """Ends the process at once. Behind a failure the others may wait in an exchange, and behind success gloo's threads
    may abort a process that tears down beside others."""
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
            print("train_lora.py: interrupted before training began, or behind its end.", file=sys.stderr)
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
