"""The specification's example on two processes: the video that plain diffusers makes in one.

Beside imports and plan, what differs is what CPUs ask for: gloo, the one kernel that runs there, a small video, and a
compiler that is done in seconds. (`tests/gpu` runs it without these.) The video is kept as arrays, for comparison.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from . import launching
from .specification import TEXT, script
from .tiny_pipelines import make

SIZE = {"height": 48, "width": 80, "num_frames": 9}
ON_CPU = (
    ('dist.init_process_group("nccl")', 'dist.init_process_group("gloo")'),
    ("torch.cuda.set_device(rank)\n", ""),
    ('"cuda"', '"cpu"'),
    ('"_native_flash"', '"native"'),
    ("torch.bfloat16", "torch.float32"),
    ('mode="max-autotune-no-cudagraphs"', 'backend="eager"'),
    ("height=480", f"height={SIZE['height']}"),
    ("width=832", f"width={SIZE['width']}"),
    ("num_inference_steps=30", "num_inference_steps=6"),
    ("num_frames=81", f"num_frames={SIZE['num_frames']}"),
)
KEPT = ("from diffusers.utils import export_to_video", "from kept import export_to_video")
KEEP = """
import numpy as np
def export_to_video(frames, path, fps):
    np.save(path + ".npy", np.stack([np.asarray(frame) for frame in frames]))
"""


def written(text: str, name: str) -> str:
    """The value that the example assigns to `name`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(f'{name} = "'))
    return line.split('"')[1]


def alone(folder: Path, text: str) -> np.ndarray:
    """The same with diffusers only, in this process: the video as `[frames, height, width, 3]`."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    pipe = WanPipeline.from_pretrained(folder, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompt=written(text, "prompt"), negative_prompt=written(text, "negative_prompt"))
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], **SIZE}
    generator = torch.Generator().manual_seed(0)
    for steps in (2, 6):  # the example draws noise twice
        video = pipe(**call, guidance_scale=5.0, num_inference_steps=steps, generator=generator, output_type="np")
    return video.frames[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specification")
    make("wan").save_pretrained(folder / "wan")
    (folder / "kept.py").write_text(KEEP)
    return folder


@pytest.mark.slow
def test_it_makes_the_video_of_one_process(folder: Path) -> None:
    text = script(folder / "wan", *ON_CPU, KEPT, ('"output.mp4"', repr(str(folder / "output.mp4"))))
    (folder / "example.py").write_text(text)
    done = launching.run_ranks(2, folder / "example.py")
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "output.mp4.npy") / 255
    expected = alone(folder / "wan", text)
    assert found.shape == expected.shape
    assert expected.std() > 0.02  # it is not a video of nothing
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(found - expected).mean() < 0.003  # half of a level is what rounding to 256 of them costs


def test_only_imports_plan_and_model_are_changed() -> None:
    before, after = TEXT.splitlines(), script(Path("tiny")).splitlines()
    changed = [line[2:].strip() for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert not [line for line in changed if not line.startswith(("from ", "ParamId(index=", "model_id = "))]
