"""Prints the results of providers, and describes the device that gave them."""

from __future__ import annotations

from typing import Any

import torch

from ..doctor.installed import installed
from ..output import STYLES, digits, heading, say, table
from .measure import Result, Setting


def environment(setting: Setting) -> dict[str, Any]:
    """What the figures were measured with."""
    device = setting.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})",
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "packages": {name: each.version for name, each in installed().items()},
    }


def title(setting: Setting) -> str:
    """The title of a picture."""
    where = environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    return f"Attention on {where['device']}, {where['dtype']}, mask: {setting.mask}{backward}"


def show(name: str, setting: Setting, results: list[Result], peak: float) -> None:
    """Prints the results of all providers at one shape. `peak` is the speed of matrix products in TFLOP/s."""
    where = environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    heading(f"{name}: {setting.shape}, {where['dtype']}, mask: {setting.mask}{backward}")
    say(f"{where['device']}; matrix products: {digits(peak)} TFLOP/s")
    rows = [
        (
            each.provider + ("" if each.exact else " (lossy)"),
            digits(each.ms),
            digits(each.tflops),
            f"{each.tflops / peak:.0%}",
            f"{each.error:.1e}",
            *([f"{each.gradient_error:.1e}"] if setting.backward else []),
            "wrong" if each.wrong else "",
        )
        for each in sorted(results, key=lambda each: each.ms or 0)
        if each.ms is not None and each.tflops is not None
    ]
    errors = ("error", *(["gradient error"] if setting.backward else []))
    header = ("provider", "ms", "TFLOP/s", "of matmul", *errors, "")
    if rows:
        table(header, rows, numbers=header[1:-1])
    for each in results:
        if each.problem:
            say(f"{each.provider}: {'not measured' if each.refused else 'failed'}: {each.problem}",
                "" if each.refused else STYLES["error"])  # fmt: skip
