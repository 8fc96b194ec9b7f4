"""Runs of the trainer at a size for tests: tiny models, a few small examples, and what a run says of its steps."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from .data.media import picture, sounding_video, video

ROOT = Path(__file__).resolve().parents[2]
TINY_FLUX = ROOT / "examples" / "tiny_flux"

# Sizes whose numbers of tokens do not divide among processes.
SETTINGS: dict[str, dict[str, Any]] = {
    "flux": {"resolution": [30], "aspects": [1.0], "max_sequence_length": 15},
    "wan": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 15},
    "cogvideox": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 21},
    "cogview4": {"resolution": [48], "aspects": [1.0]},
    "qwen_image": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 275},
    "z_image": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 41},
    "flux2": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 15},
    "sd3": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 43},
    "sdxl": {"resolution": [48], "aspects": [1.0]},
    "sdxl_v": {"resolution": [48], "aspects": [1.0], "min_snr_gamma": 5.0},
    "chroma": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 43},
    "ltx": {"resolution": [96], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 43},
    "ltx2": {"resolution": [96], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 44},
    "sana": {"resolution": [96], "aspects": [1.0], "max_sequence_length": 43},
    "lumina2": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 243},
    "hunyuan_video": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 600},
    "hunyuan_video15": {"resolution": [48], "aspects": [1.0], "num_frames": [9]},
    "flux_kontext": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 43, "guidance": 2.5},
    "flux_control": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 43, "guidance": 2.5},
    "qwen_image_edit": {"resolution": [48], "aspects": [1.0]},
    "qwen_image_edit_plus": {"resolution": [48], "aspects": [1.0]},
    "wan_i2v": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 15},
    "wan_ti2v": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 15},
    "wan_a14b": {
        "resolution": [48],
        "aspects": [1.0],
        "num_frames": [9],
        "max_sequence_length": 15,
        "expert": "low",
    },
    "wan_vace": {"resolution": [48], "aspects": [1.0], "num_frames": [9], "max_sequence_length": 15},
    "krea2": {"resolution": [48], "aspects": [1.0], "max_sequence_length": 273},
}
VIDEOS = ("wan", "cogvideox", "ltx", "hunyuan_video", "hunyuan_video15", "wan_i2v", "wan_ti2v", "wan_a14b", "wan_vace")
SOUNDING = ("ltx2",)
"""Families of videos with sound."""
WITH_REFERENCES = {"flux_kontext": 1, "flux_control": 1, "qwen_image_edit": 1, "qwen_image_edit_plus": 2}
"""Families with reference images, and how many the tests give."""
FROM_IMAGE = ("wan_i2v", "wan_ti2v", "wan_vace", *WITH_REFERENCES)
QUICK = ("flux", "wan", "cogvideox", "cogview4", "qwen_image", "z_image", "flux2")
"""Families that the usual tests train. The tests called thorough train the others."""
COMMON: dict[str, Any] = {
    "steps": 10,
    "rank": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "adapter_init": "gaussian",
    "caption_dropout": 0.3,
    "checkpoint_every": 0,
    "cpu": True,
    "mixed_precision": "no",
    "max_upscale": 4.0,
}


def make_model(name: str, folder: Path) -> Path:
    """A pipeline on the disk."""
    if name == "flux":
        return TINY_FLUX
    from .pipelines import make

    make(name).save_pretrained(folder)
    return folder


def make_data(kind: str, folder: Path, number: int = 5) -> Path:
    """Pictures, videos or videos with sound, with captions of different lengths."""
    folder.mkdir(parents=True)
    for i in range(number):
        if kind == "image":
            picture(folder / f"{i}.png", width=48, height=48, seed=i)
        elif kind == "video":
            video(folder / f"{i}.mp4", frames=9 + i, width=48, height=48)
        else:
            sounding_video(folder / f"{i}.mkv", frames=9 + i, width=48, height=48, pitch=200.0 * (i + 1))
        (folder / f"{i}.txt").write_text(f"number {i}" + " and more of it" * i)
    return folder


def make_references(folder: Path, number: int, examples: int = 5, width: int = 40, height: int = 56) -> Path:
    """Reference images for the examples of `make_data`, equally many for each."""
    folder.mkdir(parents=True)
    for i in range(examples):
        for j in range(number):
            name = f"{i}.png" if number == 1 else f"{i}_{j + 1}.png"
            picture(folder / name, width=width, height=height, seed=10 + 10 * j + i)
    return folder


def make_controls(folder: Path, examples: int = 5) -> dict[str, str]:
    """Control videos, masks of them and a reference image for each of the videos of `make_data`."""
    for i in range(examples):
        video(folder / "control" / f"{i}.mp4", frames=9 + i, width=48, height=48, noise=True)
        picture(folder / "control_mask" / f"{i}.png", width=48, height=48, seed=20 + i)
    references = make_references(folder / "references", 1, examples)
    return {"references": str(references), **{name: str(folder / name) for name in ("control", "control_mask")}}


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """One run. Returns its logged steps and the adapter's file."""
    from diffusers_attn.training import TrainConfig, Trainer

    steps: list[dict[str, float]] = []
    trainer = Trainer(TrainConfig(**settings), on_step=lambda step, numbers: steps.append({"step": step, **numbers}))
    path = trainer.run()
    return {"steps": steps, "path": str(path), "report": trainer.report and str(trainer.report)}


def train_all(several: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs, one after the other."""
    from accelerate.state import AcceleratorState, GradientState

    results = []
    from .pipelines import small_references

    for settings in several:
        with small_references():
            results.append(train(settings))
        AcceleratorState._reset_state(False)
        GradientState._reset_state()
    return results


def train_and_die(settings: dict[str, Any], event: int | None, answer: str) -> None:
    """A run that is killed when it makes its `event`-th change to its folder of checkpoints; None is not."""
    checkpoints = os.path.join(settings["output_dir"], "checkpoints")
    changes = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        changing = name in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (
            name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if changing and checkpoints in str(arguments[0]):
            changes += 1
            if changes == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    result = train(settings)
    Path(answer).write_text(json.dumps({**result, "changes": changes}))


def train_until_terminated(settings: dict[str, Any], step: int, *signals: int) -> None:
    """A run that is ended by SIGTERM, or by `signals`, while it is at `step`. Exits with its exit code."""
    from diffusers_attn.training import TrainConfig, Trainer
    from diffusers_attn.training.errors import TrainingInterrupted

    def tell(number: int, _: dict[str, float]) -> None:
        if number == step:
            for each in signals or (signal.SIGTERM,):
                os.kill(os.getpid(), each)

    try:
        Trainer(TrainConfig(**settings), on_step=tell).run()
    except TrainingInterrupted as interruption:
        sys.exit(interruption.exit_code)


def run_script(arguments: list[str], folder: str, number: int | None = None, signal_when: str | None = None) -> None:
    """`examples/train_lora.py` with a command line, in a process that has everything imported already. What it prints
    goes to the file `output` in `folder`.

    Args:
        number: of a signal that it is sent as soon as there is a file `signal_when`, with something in it.
    """
    import runpy
    import threading
    import time

    def send() -> None:
        while not (os.path.isfile(signal_when or "") and os.path.getsize(signal_when or "")):
            time.sleep(0.01)
        os.kill(os.getpid(), number or 0)

    log = os.open(os.path.join(folder, "output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if number is not None:
        threading.Thread(target=send, daemon=True).start()
    script = str(ROOT / "examples" / "train_lora.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def command_line(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of the script."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train_sharded(settings: dict[str, Any], block: str, cp_degree: int) -> dict[str, Any]:
    """A run with FSDP2. Accelerate has that for GPUs only, so these processes pretend to have some."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    axes = {
        "DP_REPLICATE": 1,
        "DP_SHARD": int(os.environ["WORLD_SIZE"]) // cp_degree,
        "CP": cp_degree,
        "TP": 1,
        "SP": 1,
    }
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": block,
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        **{f"PARALLELISM_CONFIG_{axis}_SIZE": str(size) for axis, size in axes.items()},
    }
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ |= environment
    try:
        return train(settings)
    finally:
        for name in environment:
            os.environ.pop(name)
