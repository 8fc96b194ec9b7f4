"""`examples/inference_cp.py` as users start it: two processes draw what one process draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from . import launching
from .test_quickstart import MODEL, PHOTOS, ROOT, example
from .tiny_pipelines import make

SCRIPT = ROOT / "examples" / "inference_cp.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# 15 tokens in a frame, so that the sequence does not divide by two.
SIZE = ["--height", "48", "--width", "80", "--steps", "3", "--device", "cpu", "--prompt", "a cat", "--seed", "1"]
VIDEO = ["--num_frames", "9", "--frames", "--set", "max_sequence_length=21"]
CALLS = {
    "wan": [*VIDEO, "--negative_prompt", "bad", "--ulysses_degree", "2"],
    "cogvideox": [*VIDEO, "--ring_degree", "2", "--rotate_method", "alltoall"],
    "cogview4": [
        *("--set", "max_sequence_length=33", "guidance_scale=3.0", "--ring_degree", "2"),
        *("--split_vae", "on", "--shard_weights", "--times"),
    ],
}
SHARING = ("--ulysses_degree", "--ring_degree", "--rotate_method", "--split_vae")


def launch(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher, with this checkout on the path of what it starts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return launching.run(command, env=environment)


def arguments(name: str, folder: Path, output: str, alone: bool = False) -> list[str]:
    """What the script is given to draw with one of the tiny pipelines."""
    suffix = "" if "--frames" in CALLS[name] else ".png"
    call = list(CALLS[name])
    if alone:
        call = [option for option in call if option != "--shard_weights"]
        for option in SHARING:
            if option in call:
                del call[call.index(option) : call.index(option) + 2]
    return ["--model", str(folder / name), *SIZE, *call, "--output", str(folder / f"{output}-{name}{suffix}")]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    yield example("inference_cp")
    PartialState._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipelines, saved."""
    made = tmp_path_factory.mktemp("pipelines")
    for name in CALLS:
        make(name).save_pretrained(made / name)
    return made


# One job for all of them, since most of a job's time is its start. In the end one of its ranks fails.
JOB = """
import importlib.util, json, os, sys
import numpy as np
folder, calls = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("inference_cp", {script!r})
script = importlib.util.module_from_spec(spec)
sys.modules["inference_cp"] = script
spec.loader.exec_module(script)
rank = os.environ["RANK"]
for name, call in calls.items():
    drawn = script.run(script.parse_arguments(call))
    np.save(f"{{folder}}/pixels-{{name}}-{{rank}}.npy", drawn.pixels)
draw = script.draw
def fail(*arguments):
    if rank == "1":
        raise RuntimeError("this rank has a fault")
    return draw(*arguments)
script.draw = fail
script.main([*call[:-1], f"{{folder}}/never.png"])
"""


@pytest.fixture(scope="module")
def shared(folder: Path) -> subprocess.CompletedProcess[str]:
    """What two processes printed, who drew with all of them."""
    import json

    job = folder / "job.py"
    job.write_text(JOB.format(script=str(SCRIPT)))
    calls = {name: arguments(name, folder, "shared") for name in CALLS}
    return launching.run_ranks(2, job, folder, json.dumps(calls))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_two_processes_draw_what_one_draws(
    shared: subprocess.CompletedProcess[str], script: ModuleType, folder: Path, name: str
) -> None:
    assert (folder / f"pixels-{name}-0.npy").exists(), shared.stderr
    drawn = script.run(script.parse_arguments(arguments(name, folder, "alone", alone=True)))
    other = script.run(script.parse_arguments([*arguments(name, folder, "other", alone=True), "--seed", "2"]))
    found = [np.load(folder / f"pixels-{name}-{rank}.npy") for rank in range(2)]
    assert found[0].shape == drawn.pixels.shape
    assert np.abs(other.pixels - drawn.pixels).max() > 0.1  # it is not a picture of nothing
    for pixels in found:
        assert np.abs(pixels - drawn.pixels).max() < 1e-4
    saved = folder / f"shared-{name}{'' if '--frames' in CALLS[name] else '.png'}"
    pictures = sorted(saved.iterdir()) if saved.is_dir() else [saved]
    assert len(pictures) == (len(drawn.pixels) if saved.is_dir() else 1)
    image = np.asarray(Image.open(pictures[-1]), dtype=np.float64) / 255
    assert np.abs(image - (drawn.pixels[-1] if saved.is_dir() else drawn.pixels)).max() < 2e-2


@pytest.mark.slow
def test_it_says_what_was_done(shared: subprocess.CompletedProcess[str]) -> None:
    assert "WanTransformer3DModel) on 2 ranks, Ulysses over 2" in shared.stdout
    assert "CogVideoXTransformer3DModel) on 2 ranks, a ring (alltoall) of 2" in shared.stdout
    for vae in ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLCogVideoX"):
        assert f"images are split by rows in vae ({vae})" in shared.stdout
    assert "; weights of text_encoder, transformer in 1/2 per rank" in shared.stdout
    assert shared.stdout.count("steps/s") == len(CALLS)  # rank 0 alone speaks


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job(shared: subprocess.CompletedProcess[str], folder: Path) -> None:
    """It is over within the fixture's time limit, while the other rank waits in an exchange."""
    assert shared.returncode != 0
    assert "rank 1:" in shared.stderr and "this rank has a fault" in shared.stderr
    assert not (folder / "never.png").exists()


@pytest.mark.slow
def test_accelerate_launch_with_the_demo(tmp_path: Path) -> None:
    """As `make demo-cp` has it, started by Accelerate."""
    picture = tmp_path / "new" / "picture.png"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", "0"]
    options = ["--compare", "--steps", "6", "--prompt", "a rocket", "--output", picture]
    done = launch([*accelerate, SCRIPT, "--device", "cpu", *options], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    difference = re.search(r"^difference  (\S+) .* PSNR (\S+) dB$", done.stdout, re.MULTILINE)
    assert difference is not None and float(difference[1]) < 1e-4 and float(difference[2]) > 80, done.stdout
    assert "context parallelism: transformer (FluxTransformer2DModel) on 2 ranks" in done.stdout
    assert f"saved       {picture}" in done.stdout
    assert [file.name for file in picture.parent.iterdir()] == [picture.name]  # no scratch file is left behind
    sheet = Image.open(picture).convert("RGB")  # a title, and below it both pictures with their names
    photo = np.asarray(Image.open(MODEL / "photos" / f"{PHOTOS['a rocket']}.png").convert("RGB"), dtype=np.float64)
    for left in (28, 28 + 384 + 28):
        drawn = sheet.crop((left, 56, left + 384, 56 + 384)).resize((64, 64), Image.Resampling.BOX)
        assert np.corrcoef(np.asarray(drawn, dtype=np.float64).ravel(), photo.ravel())[0, 1] > 0.9
        name = np.asarray(sheet.crop((left, 34, left + 384, 56)).convert("L"))
        assert name.min() < 128 < name.mean()  # dark letters on white
    assert np.asarray(sheet.crop((0, 0, 384, 34)).convert("L")).min() < 64


def test_make_demo_cp_starts_this_script() -> None:
    printed = launching.run(["make", "-n", "demo-cp"], cwd=ROOT)
    assert printed.stdout.count("--nproc_per_node 2 examples/inference_cp.py") == 2
    assert "--set true_cfg_scale=1.5" in printed.stdout


def test_guidance_of_the_demo(tmp_path: Path) -> None:
    """As the second picture of `make demo-cp`: each process computes one branch."""
    options = ["--device", "cpu", "--compare", "--steps", "4", "--negative_prompt", "a dog", "--times"]
    options += ["--set", "true_cfg_scale=1.5", "--output", str(tmp_path / "guided.png")]
    done = launching.run_ranks(2, SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    difference = re.search(r"^difference  (\S+) .* PSNR (\S+) dB$", done.stdout, re.MULTILINE)
    assert difference is not None and float(difference[1]) < 1e-4, done.stdout
    assert "branches of guidance and samples of a batch by groups of ranks" in done.stdout
    calls = re.search(r"^ *transformer +(\d+) ", done.stdout, re.MULTILINE)
    assert calls is not None and calls[1] == "8", done.stdout  # of which each process computes four


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ulysses_degree", "2"], "this job has one"),
        (["--set", "guidance=1"], "FluxPipeline has no argument guidance; it accepts prompt"),
        (["--frames"], "FluxPipeline generates images"),
        (["--fps", "8"], "--fps is for a video file"),
        (["--output", "picture.mp4"], "makes a .png file"),
        (["--attn_provider", "no_such_provider"], "no_such_provider"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device", "cpu", "--steps", "1", "--output", str(tmp_path / "picture.png"), *options])
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_cuda_graphs_are_for_cuda_devices(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--device", "cpu", "--cuda_graphs", "on"])
    assert "--cuda_graphs on is for CUDA devices" in capsys.readouterr().err


def test_sharded_weights_need_processes(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--device", "cpu", "--shard_weights"])
    assert "--shard_weights is for several processes" in capsys.readouterr().err


def test_a_video_without_an_encoder_is_refused_before_it_is_drawn(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    call = [*SIZE, "--num_frames", "9", "--output", str(folder / "video.mp4")]
    with pytest.raises(SystemExit):
        script.main(["--model", str(folder / "wan"), *call])
    errors = capsys.readouterr().err
    assert "`pip install imageio imageio-ffmpeg`" in errors and "--frames" in errors


def test_a_video_is_saved(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="writing videos needs imageio and imageio-ffmpeg")
    script.save(torch.rand(5, 32, 32, 3).numpy(), tmp_path / "video.mp4", fps=8, as_frames=False)
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    assert (tmp_path / "video.mp4").stat().st_size > 100
