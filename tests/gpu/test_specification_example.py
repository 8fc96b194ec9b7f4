"""The specification's example on two GPUs, at its own size: imports, plan and model are all that is changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ..specification import script
from ..test_inference_cp import TORCHRUN, launch
from ..tiny_pipelines import make

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices or more; PyTorch sees {GPUS}"),
]
# Where there is no encoder, that there are frames is all that is looked at.
NO_ENCODER = (
    "from diffusers.utils import export_to_video",
    "def export_to_video(video, path, fps): open(path, 'w').write(f'{len(video)} frames of {video[0].size}')",
)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("wan").save_pretrained(tmp_path / "wan")
    encoder = importlib.util.find_spec("imageio_ffmpeg") is not None
    (tmp_path / "example.py").write_text(script(tmp_path / "wan", *([] if encoder else [NO_ENCODER])))
    monkeypatch.chdir(tmp_path)  # it writes where it is started
    done = launch([*TORCHRUN, "example.py"])
    assert done.returncode == 0, done.stderr
    video = tmp_path / "output.mp4"
    assert video.stat().st_size > 10_000 if encoder else video.read_text() == "81 frames of (832, 480)"
