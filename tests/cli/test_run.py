"""`run` generates pictures and videos, on one process and on several, and refuses what cannot work before it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusers_attn import AttentionProviderError
from diffusers_attn.cli import launch, main
from diffusers_attn.cli.run import command, worker
from diffusers_attn.cli.run.settings import Settings

from ..documents import ROOT
from ..tiny_pipelines import make
from .programs import command as program

FLUX = str(ROOT / "examples/tiny_flux")
SMALL = ["--height", "64", "--width", "64", "--steps", "3", "--set", "max_sequence_length=32", "--device", "cpu"]


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main.app, ["run", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_picture_and_its_times(tmp_path: Path) -> None:
    output = tmp_path / "new" / "cat.png"
    found = run(FLUX, "a cat", *SMALL, "--output", str(output), "--provider", "native")
    assert Image.open(output).size == (64, 64) and found["output"] == str(output)
    seconds = found["seconds"]
    parts = seconds["text and first step"] + 2 * seconds["one of the other steps"] + seconds["decoding"]
    assert parts == pytest.approx(seconds["call"], rel=1e-3) and found["memory_bytes"] == []
    assert {"text_encoder", "transformer", "vae.decode", "other"} <= set(found["components"])
    assert sum(found["components"].values()) == pytest.approx(seconds["call"], rel=0.1)
    assert found["attention"] == "one process, attention by native" and found["dtype"] == "float32"
    text = CliRunner().invoke(main.app, ["run", FLUX, "a cat", *SMALL, "--output", str(output)]).stdout
    assert "each of the other 2 steps: " in text and text.splitlines()[-1] == f"saved {output}"
    assert [each.name for each in output.parent.iterdir()] == ["cat.png"]
    trace = str(tmp_path / "trace.json")
    arguments = "run", FLUX, "a cat", *SMALL, "--output", str(output), "--profile", trace
    text = CliRunner().invoke(main.app, arguments).stdout
    assert re.search(r"transformer +attention +native +one rank", text) and f"saved the trace {trace}" in text
    assert json.loads(Path(trace).read_text())["traceEvents"]


@pytest.mark.slow
def test_two_processes_draw_the_picture_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    run(FLUX, "a cat", *SMALL, "--output", str(one))
    done = program("run", FLUX, "a cat", *SMALL, "--output", str(two), "--gpus", "2", "--json")
    found = json.loads(done.stdout)
    assert found["processes"] == 2 and "on 2 ranks" in found["attention"]
    pictures = [np.asarray(Image.open(each)).astype(int) for each in (one, two)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_video_as_frames(tmp_path: Path) -> None:
    make("wan").save_pretrained(tmp_path / "wan")
    found = run(
        str(tmp_path / "wan"), "a cat", "--height", "48", "--width", "80", "--frames", "9", "--steps", "2", "--device",
        "cpu", "--set", "max_sequence_length=21", "--output", str(tmp_path / "frames"),
    )  # fmt: skip
    assert len(list((tmp_path / "frames").glob("*.png"))) == 9 and found["seconds"]["decoding"] > 0
    result = CliRunner().invoke(
        main.app, ["run", str(tmp_path / "wan"), "a cat", "--device", "cpu", "--output", str(tmp_path / "frames")]
    )
    assert result.exit_code == 2 and "Give the frames a new folder" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing/there", "a cat"], "is no pipeline that can be read"),
        ([FLUX, "a cat", "--frames", "5"], "FluxPipeline takes no num_frames"),
        ([FLUX, "a cat", "--set", "speed=3"], "FluxPipeline takes no speed"),
        ([FLUX, "a cat", "--set", "speed"], "NAME=VALUE is accepted"),
        ([FLUX, "a cat", "--output", "cat.mp4"], "FluxPipeline makes a picture: .png"),
        ([FLUX, "a cat", "--dtype", "int8"], "accepted are bfloat16"),
        ([FLUX, "a cat", "--provider", "xformers"], "cannot be used here"),
        ([FLUX, "a cat", "--device", "cuda"], "PyTorch sees no GPU"),
        ([FLUX, "a cat", "--shard-weights"], "--shard-weights is for several GPUs"),
    ],
)
def test_arguments_that_are_not_accepted(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main.app, ["run", *arguments])
    assert result.exit_code == 2 and expected in result.stderr and result.stdout == ""


def test_values_are_json_or_text() -> None:
    pairs = [command._name_and_value(text) for text in ("a=3.5", "b=[1, 2]", "c=true", "d=some words", "e=a=b")]
    assert pairs == [("a", 3.5), ("b", [1, 2]), ("c", True), ("d", "some words"), ("e", "a=b")]
    assert command._slug("A cat, on the MOON!") == "a-cat-on-the-moon" and command._slug("猫") == "猫"


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "model": FLUX, "call": {}, "output": "x.png", "fps": 16, "seed": 0, "device": "cpu", "processes": 2,
        "dtype": "float32", "provider": None, "compile": False, "shard_weights": False,
    }  # fmt: skip
    return Settings(**given | changes)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings(call={"prompt": "猫", "guidance_scale": 3.5}).write(tmp_path / "settings")
    assert Settings.read(tmp_path / "settings") == settings(call={"prompt": "猫", "guidance_scale": 3.5})


@pytest.mark.parametrize(
    ("error", "refused"), [(AttentionProviderError("no such thing"), True), (OSError("disk full"), False)]
)
def test_a_rank_that_fails_leaves_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, refused: bool
) -> None:
    def fails(_: Settings) -> None:
        raise error

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "run", fails)
    monkeypatch.setattr(worker.os, "_exit", leave)
    monkeypatch.setenv("RANK", "1")
    settings().write(tmp_path / "settings")
    with pytest.raises(SystemExit, match="1"):
        worker.main(tmp_path)
    left = json.loads((tmp_path / "error-1").read_text())
    assert left["refused"] == refused and str(error) in left["text"] and not (tmp_path / "result").exists()


@pytest.mark.parametrize(("refused", "code"), [(True, 2), (False, 3)])
def test_the_error_of_a_rank_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool, code: int
) -> None:
    def launched(module: str, arguments: list[str], processes: int) -> int:
        assert module == "diffusers_attn.cli.run.worker" and processes == 2
        (Path(arguments[0]) / "error-0").write_text(json.dumps({"refused": False, "text": "connection lost"}))
        if refused:
            (Path(arguments[0]) / "error-1").write_text(json.dumps({"refused": True, "text": "no such thing"}))
        return 1

    monkeypatch.setattr(launch, "launch", launched)
    result = CliRunner().invoke(main.app, ["run", FLUX, "a cat", *SMALL, "--gpus", "2"])
    assert result.exit_code == code and ("no such thing" if refused else "connection lost") in result.stderr
