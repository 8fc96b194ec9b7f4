"""Whether a GPU has NVLink, as NVIDIA's management library (NVML) reports it."""

from __future__ import annotations

import ctypes
import functools

import torch

_MOST_LINKS = 18


@functools.cache
def has_nvlink(device: int) -> bool:
    """Whether any NVLink of this CUDA device is active. False if there is no NVML to ask."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    except (OSError, AttributeError):
        return False
    if nvml.nvmlInit_v2() != 0:
        return False
    handle, active = ctypes.c_void_p(), ctypes.c_uint()
    try:
        if nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
            return False
        return any(
            nvml.nvmlDeviceGetNvLinkState(handle, ctypes.c_uint(link), ctypes.byref(active)) == 0 and active.value == 1
            for link in range(_MOST_LINKS)
        )
    finally:
        nvml.nvmlShutdown()
