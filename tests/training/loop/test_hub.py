"""`--push_to_hub`: what the real client sends to a Hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ... import launching
from ..hub import hub
from ..runs import ROOT


def train(settings: dict[str, object], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "train_lora.py"), "--push_to_hub"]
    for name, value in settings.items():
        if value is True:
            command.append(f"--{name}")
        else:
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Without Xet, whose own servers this Hub does not play, large files come by way of Git LFS.
    usual = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **usual, **environment}
    return launching.run(command, env=environment)


def test_adapter_card_and_samples_arrive(settings_of, tmp_path: Path) -> None:
    settings = settings_of(
        "cogview4",
        steps=1,
        checkpoint_every=1,
        hub_model_id="me/tried",
        validation_prompts=["a cat"],
        validation_steps=1,
    )
    output = Path(settings["output_dir"])
    settings["cache_dir"] = str(output / "cache")
    with hub() as there:
        done = train(settings, HF_ENDPOINT=there.address, HF_TOKEN="hf_tried", HF_HOME=str(tmp_path))
    assert done.returncode == 0, "\n".join([done.stderr, *there.requests])
    names = ["README.md", "pytorch_lora_weights.safetensors", "samples/last/00-a-cat.png"]
    assert there.files == {"me/tried": {name: (output / name).read_bytes() for name in names}}
    assert "Bearer hf_tried" in there.tokens
    assert 'pipe.load_lora_weights("me/tried")' in there.files["me/tried"]["README.md"].decode()


@pytest.mark.slow
def test_a_hub_that_refuses_is_reported(settings_of, tmp_path: Path) -> None:
    """With the adapter saved: it can be uploaded by hand."""
    settings = settings_of("cogview4", steps=1, hub_model_id="me/tried")
    with hub() as there:
        there.answer = lambda *request: None
        done = train(settings, HF_ENDPOINT=there.address, HF_TOKEN="hf_tried", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "nothing at /api/repos/create" in done.stderr + done.stdout, done.stderr
    assert (Path(settings["output_dir"]) / "pytorch_lora_weights.safetensors").is_file()
