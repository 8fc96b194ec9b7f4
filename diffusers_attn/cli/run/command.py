"""The command `run`."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import AttentionProviderError
from .. import exit_codes

VERSION = 1
"""Version of the JSON schema."""
DTYPES = ("bfloat16", "float16", "float32")


def run(
    model: Annotated[
        str, typer.Argument(help="Pipeline: a folder, or a repository on the Hugging Face Hub.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="Prompt for the picture or video.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .png for a picture, .mp4 for a video; without suffix, a new folder for the frames "
            "of a video. Default: outputs/, with a name made of the prompt."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels. Default: the pipeline's.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. Default: the pipeline's.", min=1)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames of a video. Default: the pipeline's.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps.", min=1)] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    fps: Annotated[int, typer.Option(help="Frames per second of a video file.", min=1)] = 16,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Further argument of the pipeline's call, such as guidance_scale=3.5: JSON, or else text. May be "
            "repeated.",
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="Attention provider. Default: the fastest exact one for each call (auto); native on CPUs."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs that share the work, or of processes on a CPU. Default: all GPUs of this machine; one "
            "process on a CPU.",
            min=1,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Type of the devices: cuda or cpu. Default: cuda if there is a GPU.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}. Default: bfloat16 on GPUs, float32 on a CPU."),
    ] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile the blocks of the transformers, before the call that is measured."),
    ] = False,
    shard_weights: Annotated[
        bool, typer.Option("--shard-weights", help="Each GPU holds only its part of the weights, if they do not fit.")
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile the call, which takes longer then: print its time by component, attention provider and "
            "exchange, and write a trace (.json or .json.gz) for chrome://tracing. Give few --steps.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Generate a picture or a video on the GPUs of this machine, and say where time and memory went.

    On several GPUs it starts one process for each, and splits the sequence between them.
    """
    from ..output import write_json
    from .settings import Settings

    kind, count = _devices(device, gpus, shard_weights)
    if dtype not in (None, *DTYPES):
        raise AttentionProviderError(f"--dtype {dtype}: accepted are {', '.join(DTYPES)}.")
    if profile is not None and not profile.name.endswith((".json", ".json.gz")):
        raise AttentionProviderError(f"--profile {profile}: a .json or a .json.gz file is accepted.")
    given = {"height": height, "width": width, "num_frames": frames}
    call = {"prompt": prompt, "num_inference_steps": steps}
    call |= {name: value for name, value in given.items() if value is not None} | dict(map(_name_and_value, set_ or ()))
    path = _checked(model, call, output, prompt)
    if provider is not None:
        _check_provider(provider)
    settings = Settings(
        model=model,
        call=call,
        output=str(path),
        fps=fps,
        seed=seed,
        device=kind,
        processes=count,
        dtype=dtype or ("float32" if kind == "cpu" else "bfloat16"),
        provider=provider,
        compile=compile_,
        shard_weights=shard_weights,
        profile=None if profile is None else str(profile.absolute()),
    )
    found = _run(settings)
    content = {"output": str(path), "device": kind, "processes": count, "dtype": settings.dtype, **found}
    if json:
        write_json("run", VERSION, content)
    else:
        _show(content, steps)


def _devices(device: str | None, gpus: int | None, shard_weights: bool) -> tuple[str, int]:
    """Type and number of the devices."""
    import torch

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise AttentionProviderError(f"--device {device}: accepted are cuda and cpu.")
    there = torch.cuda.device_count() if kind == "cuda" else None
    if there == 0:
        raise AttentionProviderError("--device cuda: PyTorch sees no GPU. `diffusers-attn doctor` says why.")
    if gpus is not None and there is not None and gpus > there:
        raise AttentionProviderError(f"--gpus {gpus}: this machine has {there}.")
    count = gpus or there or 1
    if count > 1 and importlib.util.find_spec("accelerate") is None:
        raise AttentionProviderError("several processes are connected by accelerate: `pip install accelerate`.")
    if shard_weights and count == 1:
        raise AttentionProviderError("--shard-weights is for several GPUs: with one, it would hold all weights.")
    return kind, count


def _name_and_value(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE. The value is JSON, or else text."""
    import json

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise AttentionProviderError(f"--set {text}: NAME=VALUE is accepted, such as guidance_scale=3.5.")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def _checked(model: str, call: dict[str, Any], output: Path | None, prompt: str) -> Path:
    """The file to write, after a check of the call, before weights are loaded.

    Raises:
        AttentionProviderError: there is no such pipeline, it takes other arguments, or the file does not suit it.
    """
    import diffusers

    try:
        index: Any = diffusers.DiffusionPipeline.load_config(model)
        name = index["_class_name"]
    except (OSError, KeyError) as error:
        raise AttentionProviderError(
            f"{model} is no pipeline that can be read: {' '.join(str(error).split())[:300]}. Accepted are a folder "
            "with model_index.json, and a repository on the Hugging Face Hub."
        ) from error
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise AttentionProviderError(f"diffusers {diffusers.__version__} has no pipeline {name}.")
    accepted = inspect.signature(cls.__call__).parameters
    unknown = [each for each in call if each not in accepted]
    if unknown:
        raise AttentionProviderError(
            f"{name} takes no {', '.join(unknown)}. It takes: {', '.join(list(accepted)[1:])}. Use --set for these."
        )
    if "output_type" not in accepted:
        raise AttentionProviderError(f"{name} makes neither pictures nor videos.")
    video = "num_frames" in accepted
    path = output or Path("outputs") / (_slug(prompt) + (".mp4" if video else ".png"))
    wanted = (".mp4", "") if video else (".png",)
    if path.suffix not in wanted:
        kinds = ".mp4, or no suffix for a folder of frames" if video else ".png"
        raise AttentionProviderError(f"--output {path}: {name} makes a {'video' if video else 'picture'}: {kinds}.")
    if path.suffix == "" and path.exists():
        raise AttentionProviderError(f"--output {path} exists. Give the frames a new folder.")
    missing = [each for each in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(each) is None]
    if path.suffix == ".mp4" and missing:
        raise AttentionProviderError(
            f"writing {path} needs {' and '.join(missing)}: `pip install imageio imageio-ffmpeg`; or give --output a "
            "folder for the frames."
        )
    return path


def _slug(prompt: str) -> str:
    """A file name made of the prompt."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "output"


def _check_provider(name: str) -> None:
    from ...providers.registry import provider_status, unavailable

    status = provider_status(name)
    if not status.available:
        raise unavailable(status)


def _run(settings: Any) -> dict[str, Any]:
    """The result of the run.

    Raises:
        AttentionProviderError: the library refused something on a process.
        typer.Exit: another error was raised, and has been printed.
    """
    import json
    import tempfile

    from ..launch import launch
    from ..output import complain

    if settings.processes == 1:
        from .worker import run as run_here

        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            return run_here(settings)
    with tempfile.TemporaryDirectory(prefix="diffusers-attn-run-") as name:
        folder = Path(name)
        settings.write(folder / "settings")
        code = launch("diffusers_attn.cli.run.worker", [name], settings.processes)
        if code == 0 and (folder / "result").is_file():
            return dict(json.loads((folder / "result").read_text()))
        errors = [json.loads(each.read_text()) for each in sorted(folder.glob("error-*"))]
    # An error about a lost connection follows from another rank's error.
    refused = next((each for each in errors if each["refused"]), None)
    if refused is not None:
        raise AttentionProviderError(refused["text"])
    complain(errors[0]["text"] if errors else f"the processes ended with exit code {code}.")
    raise typer.Exit(exit_codes.CANNOT)


def _show(content: dict[str, Any], steps: int) -> None:
    from ..output import digits, say

    say(content["attention"])
    texts = {
        "load": "loading and setting up",
        "compile": "compiling, with two steps",
        "text and first step": "text and first step",
        "one of the other steps": f"each of the other {steps - 1} steps",
        "decoding": "decoding",
        "save": "saving",
        "call": "the call in all",
    }
    for name, text in texts.items():
        if name in content["seconds"]:
            say(f"{text}: {digits(content['seconds'][name])} s")
    parts = ", ".join(f"{name} {digits(seconds)} s" for name, seconds in content["components"].items())
    say(f"of the call: {parts}")
    for index, each in enumerate(content["memory_bytes"]):
        say(f"GPU {index}: {each / 1e9:.1f} GB at most")
    if "profile" in content:
        from ...runtime.profiling.report import ProfilePart, as_table

        say(as_table([ProfilePart(**each) for each in content["profile"]], content["profile_notes"]))
        say(f"saved the trace {content['trace']}")
    say(f"saved {content['output']}")
