"""The current device of packages that launch on it, whatever device their tensors are on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes the GPU of `tensor` the current device inside, and restores the one before."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
