#!/usr/bin/env python
"""Generate an image or a video on several devices, each with a part of the sequence: context parallelism.

    accelerate launch --num_processes 4 examples/inference_cp.py --model black-forest-labs/FLUX.1-dev --dtype bfloat16
    torchrun --nproc_per_node 2 examples/inference_cp.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dtype bfloat16 \\
        --prompt "a cat plays the piano" --height 480 --width 832 --num_frames 81 --compile_scope regional
    torchrun --nproc_per_node 2 examples/inference_cp.py --device cpu --compare    # the toy that ships: make demo-cp

It works with any diffusers pipeline whose transformer has a plan, such as Flux, Wan, CogVideoX and CogView4. With one
process it runs without context parallelism. On CPUs, start it with torchrun, or with `ACCELERATE_USE_CPU=true
accelerate launch --multi_gpu --num_processes 2`, since `accelerate launch --cpu` starts one process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages

import diffusers
import numpy as np
import torch
import transformers
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video
from PIL import Image

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    apply_cuda_graphs,
    compare_outputs,
    component_times,
    cuda_graphs_status,
    enable_context_parallel,
    set_attention_provider,
)

TINY = Path(__file__).resolve().parent / "tiny_flux"
TINY_CALL = {"height": 64, "width": 64, "max_sequence_length": 32}
"""the only size that the toy has seen."""


class Drawn(NamedTuple):
    """A pipeline's output, and the time it took."""

    pixels: np.ndarray
    """`[height, width, 3]` or `[frames, height, width, 3]`, in [0, 1]."""
    seconds: float
    """for everything: text, steps, decoding."""
    steps_per_second: float
    """of the denoising loop, without its first step; nan for a single step."""


def join(device: str) -> PartialState:
    """Connects this process with the others that the launcher started."""
    state = PartialState(cpu=device == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise SystemExit(f"inference_cp.py: {launched} processes were started, and each found itself alone.")
    return state


def load(args: argparse.Namespace, state: PartialState) -> Any:
    """Loads the pipeline on this process's device, or in CPU memory if its weights are to be sharded. One process per
    machine downloads it."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        if not state.is_main_process or args.model == str(TINY):
            library.utils.logging.disable_progress_bar()
    dtype: Any = getattr(torch, args.dtype)
    with state.local_main_process_first():
        parts: Any = DiffusionPipeline.load_config(args.model)
        if parts.get("vae", [None, None])[1] == "AutoencoderKLWan":  # visibly worse in less than float32
            dtype = {"vae": torch.float32, "default": dtype}
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype)
    pipe.set_progress_bar_config(disable=not state.is_main_process, ncols=80)
    return pipe if args.shard_weights else pipe.to(state.device)


def call_arguments(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises SystemExit for arguments that it does not accept."""
    given = {name: getattr(args, name) for name in ("height", "width", "num_frames", "negative_prompt")}
    call = {"prompt": args.prompt, "num_inference_steps": args.steps, **(TINY_CALL if args.model == str(TINY) else {})}
    call |= {name: value for name, value in given.items() if value is not None} | dict(args.set)
    accepted = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in accepted]
    if unknown:
        raise SystemExit(
            f"inference_cp.py: {type(pipe).__name__} has no argument {', '.join(unknown)}; it accepts "
            f"{', '.join(accepted)}."
        )
    return call


def draw(pipe: Any, call: dict[str, Any], seed: int, device: torch.device) -> Drawn:
    """Calls the pipeline once, with the same noise on all ranks."""
    marks: list[Any] = []

    def mark(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if device.type == "cuda":  # an event, so that nothing waits for the device
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        return tensors

    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # An array on the CPU, so that the device has finished when the clock is read.
        output = pipe(**call, generator=generator, output_type="np", callback_on_step_end=mark)
    seconds = time.perf_counter() - began
    rate = math.nan
    if len(marks) > 1:
        first, last = marks[0], marks[-1]
        spent = first.elapsed_time(last) / 1e3 if device.type == "cuda" else last - first
        rate = (len(marks) - 1) / spent
    pixels = output.images[0] if hasattr(output, "images") else output.frames[0]
    return Drawn(np.asarray(pixels), seconds, rate)


def save(pixels: np.ndarray, path: Path, fps: int, as_frames: bool) -> None:
    """Saves an image, a video, or with `as_frames` a video as a new folder of images, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        if as_frames:
            scratch.mkdir()
            for number, frame in enumerate(pixels):
                _picture(frame).save(scratch / f"{number:04d}.png")
        elif pixels.ndim == 4:
            export_to_video(list(pixels), str(scratch), fps=fps)
        else:
            _picture(pixels).save(scratch)
        os.replace(scratch, path)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def target(pipe: Any, args: argparse.Namespace) -> tuple[Path, bool]:
    """The output path, and whether it is a folder of frames. Raises SystemExit if it cannot be written."""
    is_video = "num_frames" in inspect.signature(pipe.__call__).parameters
    if args.frames and not is_video:
        raise SystemExit(f"inference_cp.py: {type(pipe).__name__} generates images; leave --frames out.")
    if args.fps is not None and (args.frames or not is_video):
        raise SystemExit("inference_cp.py: --fps is for a video file, but images are saved; leave it out.")
    suffix = "" if args.frames else ".mp4" if is_video else ".png"
    path = args.output or Path("outputs") / f"inference_cp{suffix}"
    if args.frames and path.exists():
        raise SystemExit(f"inference_cp.py: {path} exists; give the frames a new folder: --output")
    if not args.frames and path.suffix != suffix:
        raise SystemExit(f"inference_cp.py: --output {path}: {type(pipe).__name__} makes a {suffix} file.")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if is_video and not args.frames and missing:
        raise SystemExit(
            f"inference_cp.py: writing {path} needs {' and '.join(missing)}: `pip install imageio imageio-ffmpeg`. Or "
            "give --frames to save the video as a folder of images."
        )
    return path, args.frames


def share(pipe: Any, args: argparse.Namespace, state: PartialState) -> str:
    """Splits the pipeline's sequences over the processes. Returns a line that describes the result."""
    degrees = {
        name: getattr(args, name) for name in ("ulysses_degree", "ring_degree", "guidance_degree", "data_degree")
    }
    if state.num_processes == 1 and set(degrees.values()) <= {None, 1}:
        if args.attn_provider:
            set_attention_provider(pipe, args.attn_provider)
        return f"one process: no context parallelism; attention by {args.attn_provider or 'diffusers'}"
    report = enable_context_parallel(
        pipe,
        **degrees,
        rotate_method=args.rotate_method,
        provider=args.attn_provider,
        cuda_graphs={"auto": "auto", "on": True, "off": False}[args.cuda_graphs],
        split_vae={"auto": "auto", "on": True, "off": False}[args.split_vae],
        shard_weights=args.shard_weights,
        verbose=False,
    )
    return str(report)


def largest(value: float, state: PartialState) -> float:
    """The largest value of all ranks."""
    if state.num_processes == 1:
        return value
    tensor = torch.tensor(value, device=state.device, dtype=torch.float32)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.item()


def run(args: argparse.Namespace) -> Drawn:
    """Runs the script, without ending the process. All ranks must call this."""
    state = join(args.device)
    say = print if state.is_main_process else lambda *words, **options: None
    pipe = load(args, state)
    call = call_arguments(pipe, args)
    path, as_frames = target(pipe, args)
    threads = f" (threads: {torch.get_num_threads()})" if state.device.type == "cpu" else ""
    say(f"model       {type(pipe).__name__} {args.model}, {args.dtype}")
    say(f"processes   {state.num_processes}, {state.device.type}{threads}; torch {torch.__version__}", flush=True)
    alone = None
    if args.compare:
        say("alone       every process draws all of it by itself", flush=True)
        alone = draw(pipe, call, args.seed, state.device)
    say(share(pipe, args, state), flush=True)
    components = pipe.components.items()
    denoisers = [model for name, model in components if name.startswith("transformer") and model is not None]
    if args.compile_scope != "none":
        for model in denoisers:
            apply_compile(model, args.compile_scope, dynamic=False)
    if args.cuda_graphs == "on" and state.num_processes == 1:
        for model in denoisers:
            apply_cuda_graphs(model)
    if args.compile_scope != "none" or any(map(cuda_graphs_status, denoisers)):
        warm_up = draw(pipe, call | {"num_inference_steps": 2}, args.seed, state.device)
        say(f"prepared    in {warm_up.seconds:.1f} s, with two steps", flush=True)
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    drawn = draw(pipe, call, args.seed, state.device)
    say(f"took        {drawn.seconds:.2f} s in all, {drawn.steps_per_second:.2f} steps/s")
    if args.times:
        with component_times(pipe) as times:
            draw(pipe, call, args.seed, state.device)
        say(textwrap.indent(str(times), " " * 12))
    if alone is not None:
        say(f"alone       {alone.seconds:.2f} s in all, {alone.steps_per_second:.2f} steps/s")
    if state.device.type == "cuda":
        say(f"memory      {largest(torch.cuda.max_memory_allocated() / 2**30, state):.1f} GiB at most on a device")
    if state.is_main_process:
        picture = drawn.pixels.ndim == 3
        if alone is not None:
            names = "one process", f"{state.num_processes} processes, each with a part of the work"
            file, title = path if picture else None, f"“{args.prompt}”"
            found = compare_outputs(alone.pixels, drawn.pixels, save=file, names=names, title=title, use_lpips=False)
            say(f"difference  {found.max_difference:.1e} of a pixel's range at most; PSNR {found.psnr:.1f} dB")
        if alone is None or not picture:
            save(drawn.pixels, path, args.fps or 16, as_frames)
    say(f"saved       {path}", flush=True)
    return drawn


def name_and_value(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE, such as guidance_scale=3.5. The value is JSON, or else text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--model", default=str(TINY), help="pipeline: a folder or a name on the Hub (default: the toy model)"
    )
    generation.add_argument("--prompt", default="a cat", help="prompt (default: %(default)s)")
    generation.add_argument("--negative_prompt", help="negative prompt (default: none)")
    generation.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    generation.add_argument("--height", type=int, help="height in pixels (default: the pipeline's)")
    generation.add_argument("--width", type=int, help="width in pixels (default: the pipeline's)")
    generation.add_argument("--num_frames", type=int, help="number of frames of a video (default: the pipeline's)")
    generation.add_argument("--steps", type=int, default=28, help="number of denoising steps (default: %(default)s)")
    generation.add_argument(
        "--set",
        type=name_and_value,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the pipeline's call (default: none)",
    )
    generation.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the models (default: %(default)s)",
    )
    generation.add_argument("--output", type=Path, help="output file (default: outputs/inference_cp.png, or .mp4)")
    generation.add_argument("--fps", type=int, help="frames per second of a video file (default: 16)")
    generation.add_argument("--frames", action="store_true", help="save a video as a folder of images (default: off)")
    shares = parser.add_argument_group("processes and attention")
    shares.add_argument(
        "--ulysses_degree", type=int, help="number of processes that exchange heads (default: automatic)"
    )
    shares.add_argument(
        "--ring_degree", type=int, help="number of processes that exchange keys and values (default: automatic)"
    )
    shares.add_argument(
        "--guidance_degree",
        type=int,
        help="number of groups of processes that compute different branches of guidance (default: automatic)",
    )
    shares.add_argument(
        "--data_degree",
        type=int,
        help="number of groups of processes that compute different images of a batch (default: automatic)",
    )
    shares.add_argument(
        "--rotate_method", choices=("allgather", "alltoall"), help="exchange of keys and values (default: automatic)"
    )
    shares.add_argument("--attn_provider", help="attention kernel by name (default: auto on GPUs, native on CPUs)")
    shares.add_argument(
        "--compile_scope",
        choices=("none", "regional", "full"),
        default="none",
        help="torch.compile: no part, each block, or the model (default: %(default)s)",
    )
    shares.add_argument(
        "--cuda_graphs",
        choices=("auto", "on", "off"),
        default="auto",
        help="replay steps as CUDA graphs: auto does so with several processes where possible, on always does and "
        "raises an error where it is not possible, off never does (default: %(default)s)",
    )
    shares.add_argument(
        "--split_vae",
        choices=("auto", "on", "off"),
        default="auto",
        help="share the decoding between the processes, by rows of the image: auto does so for videos "
        "(default: %(default)s)",
    )
    shares.add_argument(
        "--shard_weights",
        action="store_true",
        help="each process holds its part of the weights of transformers and text encoders (default: off)",
    )
    shares.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device type (default: cuda if available, else cpu)",
    )
    shares.add_argument(
        "--times",
        action="store_true",
        help="generate once more, and print the seconds of each component on the first process (default: off)",
    )
    shares.add_argument(
        "--compare",
        action="store_true",
        help="also generate without context parallelism, compare, and save images side by side (default: off)",
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: {args.steps}")
    if args.rotate_method and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        parser.error("--rotate_method is for several processes: start it with accelerate launch or torchrun")
    if args.shard_weights and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        parser.error("--shard_weights is for several processes: start it with accelerate launch or torchrun")
    if args.shard_weights and args.compare:
        parser.error("--compare generates with all weights on one device as well: leave out --shard_weights")
    if args.cuda_graphs == "on" and (args.device == "cpu" or args.compile_scope == "full"):
        parser.error("--cuda_graphs on is for CUDA devices, and with --compile_scope none or regional")
    return args


def end(status: int) -> None:
    """Ends this process: together with the others after success, else at once, and the launcher ends the others.

    Process groups are not destroyed, since gloo's threads may abort a process in that.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if status == 0:
            PartialState().wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rank = os.environ.get("RANK")
    name = "inference_cp.py" if rank is None else f"inference_cp.py, rank {rank}"
    status = 1
    try:
        run(args)
        status = 0
    except AttentionProviderError as error:
        print(f"{name}: {error}", file=sys.stderr)
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
    except BaseException:
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
    end(status)


if __name__ == "__main__":
    main()
