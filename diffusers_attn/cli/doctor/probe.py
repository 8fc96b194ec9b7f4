"""The functions that `isolated.run_probe` runs. Each imports what it examines, and returns JSON values.

    python -P -m diffusers_attn.cli.doctor.probe ANSWER NAME [ARGUMENTS]

writes `{"value": ...}` or `{"problem": "ImportError: ...", "package": "torch"}` to the file ANSWER. A process that
crashes writes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pytorch() -> dict[str, Any]:
    """PyTorch and the GPUs that it sees."""
    import torch

    torch.zeros(2).add_(1)  # a build whose libraries do not fit fails here at the latest
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": None,
        "nccl": None,
        "distributed": torch.distributed.is_available(),
        "cuda_error": "",
        "built_for": [],
        "gpus": [],
        "connection": None,
    }
    if torch.version.cuda is None and torch.version.hip is None:
        return found
    found["built_for"] = torch.cuda.get_arch_list()
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:  # the message says why, such as an old driver
            found["cuda_error"] = _one_line(error)
        return found
    found["cudnn"] = _version(torch.backends.cudnn.version())
    if found["distributed"] and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found["gpus"].append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": total,
                "free_bytes": free,
            }
        )
    if len(found["gpus"]) > 1:
        found["connection"] = _connection(len(found["gpus"]))
    return found


def library() -> dict[str, Any]:
    """Whether diffusers imports, and this library with everything that it needs of diffusers."""
    import diffusers

    import diffusers_attn

    for name in diffusers_attn.__all__:
        getattr(diffusers_attn, name)
    return {"version": diffusers.__version__}


def providers(*names: str) -> dict[str, Any]:
    """The status of these providers, from their packages. Imports the packages where a device fits."""
    from diffusers_attn.providers.catalog import SPECS
    from diffusers_attn.providers.hub import PACKAGE
    from diffusers_attn.providers.registry import device_reason, provider_status

    return {
        name: dataclasses.asdict(provider_status(name, PACKAGE))
        | {"exact": SPECS[name].capabilities.exact, "device": device_reason(SPECS[name])}
        for name in names
    }


def catalog() -> dict[str, Any]:
    """The package and module of every provider; None for PyTorch's own kernels."""
    from diffusers_attn.providers.catalog import SPECS

    return {
        name: [spec.requirement.distribution, spec.requirement.module] if spec.requirement else None
        for name, spec in SPECS.items()
    }


def module(name: str) -> dict[str, Any]:
    """Whether a package imports."""
    importlib.import_module(name)
    return {}


def speeds(*names: str) -> dict[str, Any]:
    """One call of each of these providers, compared with float64 and timed."""
    import torch

    from diffusers_attn.cli.bench.measure import Setting, measure
    from diffusers_attn.cli.bench.workloads import workload_shape
    from diffusers_attn.providers.catalog import SPECS

    found = {}
    for name in names:
        gpu = torch.cuda.is_available() and "cuda" in SPECS[name].capabilities.devices
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        kind = torch.bfloat16 if gpu else torch.float32
        shape = workload_shape("flux-1024" if gpu else "tiny")
        (result,) = measure([name], Setting(shape, "none", kind, device, False, 0.2))
        found[name] = dataclasses.asdict(result) | {"device": device.type, "dtype": str(kind).removeprefix("torch.")}
    return found


def links() -> dict[str, Any]:
    """Bytes per second of copies from each GPU to the next, one pair at a time."""
    import torch

    found = []
    size, repeats = 2**28, 10
    for source in range(torch.cuda.device_count()):
        target = (source + 1) % torch.cuda.device_count()
        data = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{source}")
        copied = torch.empty(size, dtype=torch.uint8, device=f"cuda:{target}")
        with torch.cuda.device(source):  # PyTorch copies on the stream of the source
            copied.copy_(data)
            torch.cuda.synchronize(source)
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            for _ in range(repeats):
                copied.copy_(data, non_blocking=True)
            ended.record()
            ended.synchronize()
        torch.cuda.synchronize(target)
        found.append(size * repeats / (began.elapsed_time(ended) / 1e3))
    return {"copies_bytes_per_second": found}


def strategies(connection: str, gpu: str, capability: str, gpus: str, copies: str) -> dict[str, Any]:
    """Which strategy suits these GPUs, see `strategies.suitable`. `copies` is empty if they were not measured."""
    from diffusers_attn.cli.doctor.strategies import suitable

    major, minor = capability.split(".")
    rate = float(copies) if copies else None
    return {"strategies": suitable(connection, gpu, (int(major), int(minor)), int(gpus), rate)}


def _connection(count: int) -> str:
    """What connects the GPUs: "nvlink", "pcie" or "host memory"."""
    import torch

    from diffusers_attn.context_parallel import job
    from diffusers_attn.context_parallel.nvlink import has_nvlink

    if all(has_nvlink(index) for index in range(count)):
        return "nvlink"
    torch.cuda.init()
    return "pcie" if job.peer_access("cuda") else "host memory"


def _version(number: int | None) -> str | None:
    """cuDNN's version in the usual form: 91900 is 9.19.0."""
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _raised_in(error: BaseException) -> str:
    """The module, without submodules, whose code raised an error. Python's own import machinery does not count."""
    names = [
        str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return next((name for name in reversed(names) if name not in ("importlib", "_frozen_importlib", "")), "")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (pytorch, library, providers, catalog, module, speeds, links, strategies)
}


def _main(answer: str, name: str, *arguments: str) -> None:
    found: dict[str, Any]
    try:
        found = {"value": PROBES[name](*arguments)}
    except BaseException as error:  # a package may raise SystemExit while it is imported
        traceback.print_exc()
        found = {"problem": _one_line(error), "package": _raised_in(error)}
    Path(answer).write_text(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:])
