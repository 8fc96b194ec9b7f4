"""The log: quiet by default, one message for each kind of call, and messages of rank 0 unless all are wanted."""

from __future__ import annotations

import logging

import pytest
import torch

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider, logs


@pytest.fixture
def set_up():
    before = list(logs.logger.handlers), logs.logger.level, logs.logger.propagate
    yield logs.set_up
    logs.logger.handlers[:], level, logs.logger.propagate = before
    logs.logger.setLevel(level)


def attend(head_dim: int) -> None:
    """Calls of two lengths, which are one kind."""
    for length in (3, 3, 5):
        attention_dispatch(*torch.randn(3, 1, 7, length, head_dim))


def test_one_message_for_each_kind_of_call(set_up, capsys):
    attend(41)
    assert capsys.readouterr().err == ""
    set_up("debug")
    attend(42)
    with attention_provider("auto"):
        attend(42)
    named, chosen = capsys.readouterr().err.splitlines()
    assert named.startswith("diffusers_attn [rank 0] DEBUG: attention by native (named): float32 on cpu, 7 heads of 42")
    assert "attention by native (the first that supports the call" in chosen
    set_up("info")
    attend(43)
    assert capsys.readouterr().err == ""


def test_ranks(set_up, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = logging.getLogger("diffusers_attn.somewhere")
    set_up("info")
    log.info("not shown")
    log.warning("shown")
    set_up("info-all-ranks")
    log.info("shown too")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["diffusers_attn [rank 1] WARNING: shown", "diffusers_attn [rank 1] INFO: shown too"]


def test_an_unknown_level(set_up):
    with pytest.raises(AttentionProviderError, match="DIFFUSERS_ATTN_LOG=loud; accepted are debug, info"):
        set_up("loud")


def test_lowerings_are_named_and_nothing_else():
    from diffusers_attn.providers.decision import _lowerings
    from diffusers_attn.providers.serving import Serving

    plain = Serving("native", "bhsd", causal="kernel")
    assert _lowerings(plain) == ""
    assert _lowerings(plain._replace(pad_head_dim=1)) == "; head_dim padded to 1"
    assert _lowerings(plain._replace(repeat_kv=True, causal="drop_keys")) == (
        "; key heads repeated, keys that no query sees dropped"
    )
