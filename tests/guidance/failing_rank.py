"""A script for two ranks: in a guided step one fails, and the other prints the error that ends its waiting."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from diffusers_attn import enable_context_parallel
from tests.guidance.families import build, draw

torch.set_num_threads(1)
dist.init_process_group("gloo")
pipe = build("wan")
enable_context_parallel(pipe, verbose=False, timeout=30)
draw(pipe, "wan")
calls = []


def fail_in_the_second_call(*_: object) -> None:
    calls.append(1)
    if len(calls) == 2:
        raise ZeroDivisionError("this rank has a fault")


if dist.get_rank() == int(sys.argv[1]):
    pipe.transformer.blocks[0].register_forward_pre_hook(fail_in_the_second_call)
try:
    draw(pipe, "wan")
except Exception as error:
    print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}", flush=True)
sys.stdout.flush()
os._exit(0)
