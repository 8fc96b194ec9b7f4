"""What to measure, from the options of `bench`."""

from __future__ import annotations

import os

import torch

from ...errors import AttentionProviderError
from ...providers.registry import list_providers, provider_name, provider_status, unavailable
from .measure import Setting
from .workloads import DTYPES, MASKS, shape_of, workload_shape


def settings_of(
    workloads: list[str] | None,
    shapes: list[str] | None,
    providers: list[str] | None,
    mask: str,
    backward: bool,
    dtype: str | None,
    device: str | None,
    seconds: float,
) -> tuple[list[tuple[str, Setting]], list[str]]:
    """The named settings and the providers, checked before anything runs."""
    on = _device(device)
    if mask not in MASKS:
        raise AttentionProviderError(f"--mask {mask}: accepted are {', '.join(MASKS)}.")
    if dtype not in (None, *DTYPES):
        raise AttentionProviderError(f"--dtype {dtype}: accepted are {', '.join(DTYPES)}.")
    kind = getattr(torch, dtype or ("float32" if on.type == "cpu" else "bfloat16"))
    names = list(workloads or ()) or ([] if shapes else ["tiny" if on.type == "cpu" else "flux-1024"])
    named = [(name, workload_shape(name)) for name in names] + [(text, shape_of(text)) for text in shapes or ()]
    chosen = [provider_name(each) for each in providers or ()]
    for name in chosen:
        status = provider_status(name)
        if not status.available:
            raise unavailable(status)
    chosen = chosen or [each.name for each in list_providers() if each.available]
    return [(name, Setting(shape, mask, kind, on, backward, seconds)) for name, shape in named], chosen


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).partition("\n")[0]
        raise AttentionProviderError(
            f"--device {name}: {problem}. Accepted is a device that PyTorch can use here, such as cpu or cuda:0."
        ) from error
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def device_of_rank() -> str | None:
    """This rank's GPU; None without one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None
