"""Errors appear once, in the words of the command line, without tracebacks and repetitions."""

from __future__ import annotations

import re
import sys

import pytest

from diffusers_attn.training.commandline import report, with_options
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.ranks import OtherRankError
from diffusers_attn.training.settings.config import TrainConfig

from .. import launching
from .data.media import album, cut
from .runs import ROOT, TINY_FLUX


@pytest.mark.parametrize(
    "message, shown",
    [
        ("pass on_bad_data='skip' to train", "pass --on_bad_data skip to train"),
        ("Name the column with caption_column=...", "Name the column with --caption_column ..."),
        ("resolution=[512, 768] is", "--resolution 512 768 is"),
        ("enlarged 2.00 times, but max_upscale is 1.25", "enlarged 2.00 times, but --max_upscale is 1.25"),
        ("Add 1 to `frames` to train on both", "Add 1 to --num_frames to train on both"),
        (
            "pick='spread' takes; then fps=24.0 cannot be kept.",
            "--frame_pick spread takes; then --fps 24.0 cannot be kept.",
        ),
        ("Pass incomplete='fill', more `repeats`.", "Pass --incomplete_batches fill, more --repeats."),
        ("ulysses_degree=3, ring_degree=2: 6.", "--ulysses_degree 3, --ring_degree 2: 6."),
        ("model='a b' cannot", "--model 'a b' cannot"),
        ("compile=False is", "--no-compile is"),
        # What is in the words of the command line already, and what is none of a setting.
        ("--learning_rate -1: accepted", "--learning_rate -1: accepted"),
        ("give another --output_dir.", "give another --output_dir."),
        ("/tmp/cache_dir/a.png and a/output_dir", "/tmp/cache_dir/a.png and a/output_dir"),
        ("no 'caption_column' and my_seed=1", "no 'caption_column' and my_seed=1"),
        ("a model of 3 frames, seed 5", "a model of 3 frames, seed 5"),
    ],
)
def test_words(message, shown):
    assert with_options(message) == shown


def test_warnings_are_in_these_words_and_beside_bars(tmp_path):
    script = """
import logging, sys, time
from tqdm import tqdm
from diffusers_attn.training.commandline import log_warnings
log_warnings()
with tqdm(total=3, file=sys.stderr, desc="training") as bar:
    bar.update(1)
    logging.getLogger("any").warning("takes larger `frames`")
"""
    done = launching.run([sys.executable, "-c", script], cwd=ROOT)
    lines = re.split(r"[\r\n]", done.stderr)
    assert "WARNING takes larger --num_frames" in lines, done.stderr


def test_another_processs_failure_is_not_told(capsys):
    report(OtherRankError("encoding failed on another process; see its message."), "train")
    assert capsys.readouterr() == ("", "")
    report(TrainingDataError("pass on_bad_data='skip'"), "train")
    assert capsys.readouterr().err == "train: pass --on_bad_data skip\n"
    report(RuntimeError("unforeseen"), "train")
    assert "RuntimeError: unforeseen" in capsys.readouterr().err


def test_advice_names_options_that_there_are():
    """Every option that a message of training names."""
    known = {f"--{name}" for name in vars(TrainConfig(model="m", data="d"))} | {
        "--help",
        "--config",
        "--recipe",
        "--low_vram",
    }
    known |= {name.replace("--", "--no-") for name in known}
    others = {"--no-", "--multi_gpu", "--num_processes", "--fsdp_version", "--parallelism_config_cp_size"}
    others |= {"--use_parallelism_config"}  # of accelerate launch
    others |= {"--settings"}  # of diffusers-attn train
    for path in (ROOT / "diffusers_attn" / "training").rglob("*.py"):
        found = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", path.read_text()))
        assert found <= known | others, (path.name, found - known - others)


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path):
    """Bad data, found by both before there is any step; and an option that there is not."""
    data = album(tmp_path / "data", 3)
    cut(data / "00.png", 0.5)
    script = [ROOT / "examples" / "train_lora.py", "--cpu", "--model", TINY_FLUX, "--data", data]
    script += ["--output_dir", tmp_path / "out", "--resolution", "32"]
    done = launching.run_ranks(2, *script)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if "train_lora.py: " in line]
    assert len(ours) == 1 and "--on_bad_data skip" in ours[0], done.stderr
    assert done.stderr.count("00.png: a broken image") == 1
    assert "Traceback" not in done.stderr
    done = launching.run_ranks(2, *script, "--ranks", "2")
    assert done.stderr.count("unrecognized arguments: --ranks 2.") == 1 and "usage:" not in done.stderr
