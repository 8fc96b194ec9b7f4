"""Measured speeds in the form that `auto` reads (`providers/speeds_file.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...errors import AttentionProviderError
from ...providers.speeds import LONG
from ...providers.speeds_file import Tables
from .measure import Result, Setting


def check_savable(setting: Setting) -> None:
    """Raises AttentionProviderError unless `auto` can use the speeds: those of forward calls without a mask, in half
    precision, on a CUDA GPU."""
    if setting.device.type != "cuda" or setting.dtype not in (torch.bfloat16, torch.float16):
        raise AttentionProviderError("--save: `auto` reads speeds of CUDA GPUs in bfloat16 or float16. Leave it out.")
    if setting.mask != "none" or setting.backward:
        raise AttentionProviderError(
            "--save: `auto` chooses by the speed of a forward without a mask. Leave --mask and --backward out."
        )


def speeds_of(measured: Iterable[tuple[Setting, Sequence[Result]]]) -> Tables:
    """The speeds of all providers that gave right results. One that was measured at short or at long sequences alone
    has this speed for both; of several such shapes, the fastest counts."""
    found: dict[tuple[tuple[int, int], int], dict[str, dict[bool, float]]] = {}
    for setting, results in measured:
        key = torch.cuda.get_device_capability(setting.device), setting.shape.head_dim
        for each in results:
            if each.tflops is not None and not each.wrong and each.provider != "auto":
                speeds = found.setdefault(key, {}).setdefault(each.provider, {})
                long = setting.shape.length >= LONG
                speeds[long] = max(speeds.get(long, 0.0), each.tflops)
    return {
        key: {
            name: (speeds.get(False, speeds.get(True, 0.0)), speeds.get(True, speeds.get(False, 0.0)))
            for name, speeds in table.items()
        }
        for key, table in found.items()
    }
