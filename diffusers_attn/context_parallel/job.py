"""The distributed job: connecting its ranks, and facts about this machine."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ..errors import AttentionProviderError
from .nvlink import has_nvlink

HOW_TO_LAUNCH = (
    "Start the script with `accelerate launch --num_processes 2 script.py` or `torchrun --nproc_per_node 2 script.py` "
    "(on CPUs, Accelerate's command is `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 "
    "script.py`: with --cpu it starts one process)"
)


def join(device_type: str) -> bool:
    """Initialises torch.distributed, if it is not, by Accelerate from the launcher's environment variables.

    Returns:
        Whether it was not initialised before. Accelerate has then made this rank's GPU the current one.

    Raises:
        AttentionProviderError: the job has one rank, cannot be joined, or has no backend for `device_type`.
    """
    if not dist.is_available():
        raise AttentionProviderError(
            "this PyTorch was built without torch.distributed, which context parallelism needs."
        )
    joins = not dist.is_initialized()
    if joins:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched < 2:
            raise AttentionProviderError(
                f"context parallelism shares a sequence between ranks, and this job has one. {HOW_TO_LAUNCH}, or leave "
                "enable_context_parallel out."
            )
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise AttentionProviderError(
                f"the launcher started {launched} ranks, which are not connected yet. Install Accelerate (`pip install "
                "accelerate`), or call torch.distributed.init_process_group first."
            ) from error
        PartialState(cpu=device_type == "cpu")
        if not dist.is_initialized():
            raise AttentionProviderError(
                f"the launcher started {launched} ranks, but Accelerate was set up in each of them as a job of one. "
                "On CPUs use Accelerator(cpu=True) or PartialState(cpu=True), or set ACCELERATE_USE_CPU=true."
            )
    if dist.get_world_size() < 2:
        raise AttentionProviderError(
            f"context parallelism shares a sequence between ranks, and this job has one. {HOW_TO_LAUNCH}, or leave "
            "enable_context_parallel out."
        )
    backends = dist.get_backend_config(dist.group.WORLD)
    if f"{device_type}:" not in backends:
        raise AttentionProviderError(
            f"the model is on {device_type}, but torch.distributed was initialised with {backends}, which cannot "
            "exchange tensors of that device. Move the model before this call, initialise with "
            "backend='cpu:gloo,cuda:nccl', or let this call initialise it."
        )
    return joins


def check_gpu(device: torch.device) -> None:
    """Checks that a model is on this rank's GPU, which is the current one. NCCL takes no two ranks on one GPU.

    Raises:
        AttentionProviderError: it is on another GPU.
    """
    if device.type == "cuda" and device.index not in (None, own := torch.cuda.current_device()):
        raise AttentionProviderError(
            f"the model is on {device}, but the GPU of this rank is cuda:{own}. Move it there before this call: "
            "`pipe.to(accelerate.PartialState().device)`, or with offloading "
            "`pipe.enable_model_cpu_offload(device=accelerate.PartialState().device)`. `.to('cuda')` is the first GPU "
            "on all ranks, unless PartialState() or torch.cuda.set_device was called before."
        )


def ranks_per_node() -> int | None:
    """Number of ranks on this machine, from `LOCAL_WORLD_SIZE`. None if the launcher does not set it."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local else None


def nvlink(device_type: str) -> bool:
    """Whether the current device is connected by NVLink."""
    return device_type == "cuda" and has_nvlink(torch.cuda.current_device())


def peer_access(device_type: str) -> bool:
    """Whether the visible GPUs can read each other's memory. True if this process sees only one of them."""
    if device_type != "cuda":
        return False
    devices = range(torch.cuda.device_count())
    return all(torch.cuda.can_device_access_peer(one, two) for one in devices for two in devices if one != two)
