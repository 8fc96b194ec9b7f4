"""A file of speeds measured on this machine decides what `auto` takes, where the environment names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_attn import AttentionProviderError, DispatchProcessor
from diffusers_attn.parallelize.choices import _facts
from diffusers_attn.parallelize.workload import attention_flops
from diffusers_attn.providers import selection, speeds, speeds_file
from diffusers_attn.providers.hardware import REFERENCE

from .test_selection import CALL, hopper  # noqa: F401

HOPPER = ((9, 0), 128)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "speeds.json"
    monkeypatch.setenv(speeds_file.SETTING, str(path))
    yield path
    speeds_file._read_once.cache_clear()


def test_without_a_file_the_speeds_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(speeds_file.SETTING, raising=False)
    assert speeds.measured((9, 0), 100) == (128, speeds.MEASURED[HOPPER])
    assert speeds.measured((9, 0), 200) == (0, {}) == speeds.measured(None, 64)
    assert speeds_file.fingerprint() == "none"


def test_speeds_of_a_file_take_precedence(file: Path, hopper: None) -> None:  # noqa: F811
    call = CALL._replace(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128, value_head_dim=128)
    before = [name for name, _ in _candidates_without_file(call)]
    speeds_file.write(file, {HOPPER: {"flex": (999.0, 1.0)}}, {})
    assert before[0] != "flex"
    name, why = selection.candidates(call._replace(long=False))[0]
    assert name == "flex" and "999 TFLOP/s measured on sm_90 with head_dim 128" in why
    assert selection.candidates(call._replace(long=True))[0][0] != "flex"
    assert {name for name, _ in selection.candidates(call)} == set(before)
    assert speeds_file.fingerprint() != "none"
    assert attention_flops(["flex"], (9, 0), 128, 4608, REFERENCE) > 900e12


def test_ranks_compare_their_speeds(file: Path) -> None:
    """Otherwise `auto` might take another kernel on each of them."""
    speeds_file.write(file, {HOPPER: {"flex": (999.0, 1.0)}}, {})
    facts = _facts([], DispatchProcessor("native"), False)
    assert facts["file of measured speeds"] == speeds_file.fingerprint()


def _candidates_without_file(call: selection.CallProperties) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(speeds_file.SETTING)
        return selection.candidates(call)


def test_a_gpu_that_the_library_has_not_measured(file: Path) -> None:
    speeds_file.write(file, {((8, 9), 64): {"flash": (100.0, 120.0)}}, {"device": "RTX"})
    assert speeds.measured((8, 9), 40) == (64, {"flash": (100.0, 120.0)})
    assert speeds.measured((8, 9), 128) == (0, {})
    assert json.loads(file.read_text())["measured_with"] == {"device": "RTX"}


def test_writing_keeps_what_was_not_measured_again(file: Path) -> None:
    speeds_file.write(
        file, {HOPPER: {"flash": (1.0, 2.0), "flex": (3.0, 4.0)}, ((8, 0), 64): {"flash": (5.0, 6.0)}}, {}
    )
    speeds_file.write(file, {HOPPER: {"flash": (7.0, 8.0)}}, {})
    assert speeds_file.read(file) == {
        HOPPER: {"flash": (7.0, 8.0), "flex": (3.0, 4.0)}, ((8, 0), 64): {"flash": (5.0, 6.0)}
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"schema": "another/1"}',
        '{"schema": "diffusers-attn/speeds/1"}',
        '{"schema": "diffusers-attn/speeds/1", "tables": [{"compute_capability": [9], "head_dim": 64, "tflops": {}}]}',
        '{"schema": "diffusers-attn/speeds/1", "tables": [{"compute_capability": [9, 0], "head_dim": 64, '
        '"tflops": {"flash": [1, -1]}}]}',
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(file: Path, content: str | None) -> None:
    if content is not None:
        file.write_text(content)
        with pytest.raises(AttentionProviderError, match="exists and is no file of measured speeds"):
            speeds_file.write(file, {}, {})
        assert file.read_text() == content
    with pytest.raises(AttentionProviderError, match="DIFFUSERS_ATTN_SPEEDS=.*cannot be used"):
        speeds.measured((9, 0), 64)
