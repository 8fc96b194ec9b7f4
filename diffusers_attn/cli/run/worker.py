"""One process of `diffusers-attn run`.

    python -m diffusers_attn.cli.run.worker FOLDER

reads the settings from FOLDER. The first rank writes the picture or video, and the times as JSON to FOLDER/result. A
rank that fails writes its error to FOLDER/error-RANK and ends at once, so that the launcher ends the others.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ... import (
    AttentionProviderError,
    apply_compile,
    component_times,
    enable_context_parallel,
    profile,
    set_attention_provider,
)
from ...runtime.profiling.report import ProfileReport
from ...safetensors_only import from_safetensors
from .settings import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Calls the pipeline on this process, which is one of `settings.processes`. All of them must call this.

    Returns:
        Times in seconds, also of the pipeline's components in the measured call; memory in bytes; and the report of
        context parallelism.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    began = time.perf_counter()
    pipe = _load(settings, rank)
    if not (settings.shard_weights and settings.processes > 1):
        pipe.to(device)
    attention = _attention(pipe, settings)
    denoisers = [
        each for name, each in pipe.components.items() if name.startswith("transformer") and isinstance(each, nn.Module)
    ]
    times = {"load": time.perf_counter() - began}
    if settings.compile:
        for each in denoisers:
            apply_compile(each)
        began = time.perf_counter()
        _call(pipe, settings, device, settings.call | {"num_inference_steps": 2})
        times["compile"] = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with component_times(pipe) as components, contextlib.ExitStack() as stack:
        report = None if settings.profile is None else stack.enter_context(profile(pipe))
        pixels, measured = _call(pipe, settings, device, settings.call)
        seconds = components.seconds
    times |= measured
    began = time.perf_counter()
    if rank == 0:
        save(pixels, Path(settings.output), settings.fps)
    times["save"] = time.perf_counter() - began
    return {
        "attention": attention,
        "seconds": times,
        "components": seconds,
        "memory_bytes": _memory(device, settings.processes),
        **({} if report is None else _profile(report, Path(str(settings.profile)), rank)),
    }


def _profile(report: ProfileReport, path: Path, rank: int) -> dict[str, Any]:
    """Writes the trace of this rank. Returns the parts of the time."""
    if rank:
        path = path.with_name(path.name.replace(".json", f".rank{rank}.json"))
    report.save_trace(path)
    return {
        "profile": [each._asdict() for each in report.parts],
        "profile_notes": list(report.notes),
        "trace": str(path),
    }


def _load(settings: Settings, rank: int) -> Any:
    """The pipeline in CPU memory."""
    dtype: Any = getattr(torch, settings.dtype)
    parts: Any = DiffusionPipeline.load_config(settings.model)
    if (parts.get("vae") or [None, None])[1] == "AutoencoderKLWan":  # visibly worse in less than float32
        dtype = {"vae": torch.float32, "default": dtype}
    pipe = from_safetensors(DiffusionPipeline, settings.model, dtype=dtype)
    pipe.set_progress_bar_config(disable=rank > 0)
    return pipe


def _attention(pipe: Any, settings: Settings) -> str:
    """Sets the provider, and on several processes context parallelism. Returns a line about it."""
    if settings.processes > 1:
        report = enable_context_parallel(
            pipe, provider=settings.provider, shard_weights=settings.shard_weights, verbose=False
        )
        return str(report)
    set_attention_provider(pipe, settings.provider or "auto")
    return f"one process, attention by {settings.provider or 'auto'}"


def _call(pipe: Any, settings: Settings, device: torch.device, call: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Calls the pipeline with the same noise on all ranks. Returns the pixels and the times."""
    marks: list[float] = []

    def mark(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, steps - 1):
            _synchronize(device)
            marks.append(time.perf_counter())
        return tensors

    steps = call["num_inference_steps"]
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        call = call | {"callback_on_step_end": mark}
    _synchronize(device)
    began = time.perf_counter()
    with torch.no_grad():
        output = pipe(**call, generator=torch.Generator().manual_seed(settings.seed), output_type="np")
    _synchronize(device)
    ended = time.perf_counter()
    times = {"call": ended - began}
    if marks:
        times["text and first step"] = marks[0] - began
        if len(marks) > 1:
            times["one of the other steps"] = (marks[-1] - marks[0]) / (steps - 1)
        times["decoding"] = ended - marks[-1]
    pixels = output.images[0] if hasattr(output, "images") else output.frames[0]
    return np.asarray(pixels), times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device, processes: int) -> list[int]:
    """The most bytes allocated to tensors on each GPU; empty on a CPU."""
    if device.type != "cuda":
        return []
    mine = torch.cuda.max_memory_allocated()
    if processes == 1:
        return [mine]
    found = torch.empty(processes, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(found, torch.tensor([mine], device=device))
    return found.tolist()


def save(pixels: Any, path: Path, fps: int) -> None:
    """Writes an image, a video, or for a path without suffix the frames of a video, complete or not at all.

    Args:
        pixels: `[height, width, 3]` or `[frames, height, width, 3]`, in [0, 1].
    """
    from diffusers.utils.export_utils import export_to_video
    from PIL import Image

    def picture(frame: Any) -> Any:
        return Image.fromarray((frame.clip(0, 1) * 255).round().astype(np.uint8))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        if path.suffix == ".mp4":
            export_to_video(list(pixels), str(scratch), fps=fps)
        elif pixels.ndim == 4:
            scratch.mkdir()
            for number, frame in enumerate(pixels):
                picture(frame).save(scratch / f"{number:04d}.png")
        else:
            picture(pixels).save(scratch)
        os.replace(scratch, path)


def main(folder: Path) -> None:
    """Runs this rank, and ends the process."""
    rank = os.environ.get("RANK", "0")
    try:
        found = run(Settings.read(folder / "settings"))
        if rank == "0":
            (folder / "result").write_text(json.dumps(found))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        status = 0
    except BaseException as error:
        known = isinstance(error, AttentionProviderError)
        if not known:
            traceback.print_exc()
        text = str(error) if known else f"{type(error).__name__}: {error}"
        (folder / f"error-{rank}").write_text(json.dumps({"refused": known, "text": text}))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the threads of gloo may abort a process that ends in the usual way


if __name__ == "__main__":
    main(Path(sys.argv[1]))
