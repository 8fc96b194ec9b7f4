"""The quick start as a newcomer runs it, and the small model that it ships with."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image

from . import launching

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny_flux"
PHOTOS = {"an astronaut": "astronaut", "a cat": "chelsea", "a cup of coffee": "coffee", "a rocket": "rocket"}


def example(name: str) -> ModuleType:
    """A script of `examples/`, imported without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return example("quickstart")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One run from the command line, with half the usual steps: what it printed and the picture it saved."""
    picture = tmp_path_factory.mktemp("quickstart") / "new" / "pictures.png"
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--device", "cpu", "--steps", "6"]
    command += ["--output", picture]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = launching.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout, picture


def test_it_prints_provider_time_difference_and_path(run: tuple[str, Path]) -> None:
    printed, picture = run
    assert re.search(r"^diffusers' own +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)
    assert re.search(r"^native +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)
    difference = re.search(r"^largest difference +(\S+)", printed, re.MULTILINE)
    assert difference is not None and float(difference[1]) < 1e-5
    assert f"saved               {picture}" in printed
    assert "note" not in printed


def test_both_rows_show_the_photographs(run: tuple[str, Path], quickstart: ModuleType) -> None:
    _, picture = run
    assert [file.name for file in picture.parent.iterdir()] == [picture.name]  # no scratch file is left behind
    sheet = Image.open(picture).convert("RGB")
    tile, height = quickstart.TILE, quickstart.TILE + quickstart.HEADER
    assert sheet.size == (len(PHOTOS) * tile, 2 * height)

    photos = [np.asarray(Image.open(MODEL / "photos" / f"{name}.png").convert("RGB")) for name in PHOTOS.values()]
    size = (quickstart.SIZE, quickstart.SIZE)
    for row in range(2):
        for column, caption in enumerate(PHOTOS):
            left, top = column * tile, row * height + quickstart.HEADER
            drawn = np.asarray(sheet.crop((left, top, left + tile, top + tile)).resize(size, Image.Resampling.BOX))
            likeness = [float(np.corrcoef(drawn.ravel(), photo.ravel())[0, 1]) for photo in photos]
            assert likeness[column] > 0.9, f"{caption!r} in row {row} is like its photograph by {likeness[column]} only"
            assert np.argmax(likeness) == column


def test_unknown_prompt_is_drawn_with_a_note(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    quickstart.main(["--device", "cpu", "--steps", "1", "--prompt", "a green bicycle", "--output", str(picture)])
    assert "expect a blend of those for 'a green bicycle'" in capsys.readouterr().out
    assert Image.open(picture).width == quickstart.TILE


def test_unknown_provider_is_one_clear_message(quickstart: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no_such_provider") as stopped:
        quickstart.main(["--provider", "no_such_provider"])
    assert stopped.value.__suppress_context__  # so Python prints the message alone, without a traceback


def test_shipped_model_is_small_and_complete(quickstart: ModuleType) -> None:
    weights = list(MODEL.rglob("*.safetensors"))
    assert len(weights) == 4 and sum(file.stat().st_size for file in weights) < 4_000_000
    assert quickstart.known_captions() == list(PHOTOS)
    card = (MODEL / "README.md").read_text()
    assert "CC0" in card and "public domain" in card


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1 / 128)])
def test_shipped_vae_is_the_identity(dtype: torch.dtype, tolerance: float) -> None:
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", torch_dtype=dtype)
    picture = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    with torch.no_grad():
        latent = vae.encode(picture).latent_dist.sample()
        assert (latent - picture).abs().max() <= tolerance
        assert (vae.decode(latent).sample - picture).abs().max() <= tolerance


def test_the_script_trains_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    maker = example("make_tiny_flux")
    monkeypatch.setattr(maker, "draw", functools.partial(maker.draw, steps=1))
    output, work = tmp_path / "model", tmp_path / "work"
    common = ["--batch", "4", "--device", "cpu", "--output", str(output), "--work", str(work)]
    maker.main([*common, "--steps", "1"])
    maker.main([*common, "--steps", "2", "--resume"])
    assert sorted(file.name for file in work.iterdir()) == ["sheet.png", "state.pt"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []  # no scratch folder is left
    assert "2 steps of 4" in (output / "README.md").read_text()
    pipe = FluxPipeline.from_pretrained(output, dtype=torch.float32)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}
    assert torch.load(work / "state.pt", weights_only=True)["progress"]["step"] == 2
