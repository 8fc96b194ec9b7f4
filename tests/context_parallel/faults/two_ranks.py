"""A script for two ranks, on gloo or with a GPU each. The second has a fault at its third forward; the first prints the
error that it gets, and how long it waited."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from diffusers_attn import enable_context_parallel
from diffusers_attn.context_parallel.comm import rank_progress
from diffusers_attn.nested import mapped
from tests.parallelize.test_enable import build, inputs, output

IDLE = 4.0
TIMEOUT = 6.0
"""of `computes_for_ever`"""


def fails(*_: Any) -> None:
    raise ZeroDivisionError("this rank has a fault")


def is_killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def waits(*_: Any) -> None:
    time.sleep(600)


def computes(*_: Any) -> None:
    until = time.process_time() + 2 * IDLE
    while time.process_time() < until:
        pass


def computes_for_ever(*_: Any) -> None:
    while True:
        pass


fault, where, inputs_are, device = sys.argv[1:]
torch.set_num_threads(1)
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
model, given = build("flux").to(device), mapped(inputs("flux"), lambda each: each.to(device))
timeout = TIMEOUT if fault == "computes_for_ever" else None
enable_context_parallel(model, inputs=inputs_are, verbose=False, cuda_graphs=False, timeout=timeout)
rank_progress.wait_for_idle_ranks(IDLE)
with torch.no_grad():
    output(model, given)
    output(model, given)
    start = time.monotonic()
    try:
        if dist.get_rank() == 1:
            if where == "within":
                model.transformer_blocks[1].register_forward_pre_hook(globals()[fault])
            else:
                globals()[fault]()
        output(model, given)
        if device == "cuda":  # whose exchanges the host does not wait for
            output(model, given)
        print("no error", flush=True)
    except Exception as error:
        print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}", flush=True)
        if dist.get_rank() == 1:
            time.sleep(600)
print(f"waited {time.monotonic() - start:.1f}", flush=True)
sys.stdout.flush()
os._exit(0)
