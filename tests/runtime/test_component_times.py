"""`component_times`: every component's calls are timed, once, and nothing is left behind."""

from __future__ import annotations

import functools

import pytest
import torch

from diffusers_attn import AttentionProviderError, component_times

from ..tiny_pipelines import make

CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}


def test_components_of_a_call():
    pipe = make("wan")
    pipe.set_progress_bar_config(disable=True)
    with component_times(pipe) as times:
        pipe("a cat", negative_prompt="a dog", guidance_scale=5.0, **CALL)
    assert times.calls == {"text_encoder": 2, "transformer": 4, "vae.decode": 1}
    seconds = times.seconds
    assert list(seconds) == ["text_encoder", "transformer", "vae.decode", "other"]
    assert all(each >= 0 for each in seconds.values()) and seconds["transformer"] > 0
    assert [line.split()[0] for line in str(times).splitlines()] == ["component", *seconds]
    models = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    assert not any({"_call_impl", "encode", "decode"} & set(vars(each)) for each in models)
    pipe("a cat", **CALL)
    assert times.calls["transformer"] == 4 and times.seconds["other"] == seconds["other"]


def test_a_call_that_fails():
    pipe = make("wan")
    with pytest.raises(ZeroDivisionError), component_times(pipe) as times:
        pipe.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
        pipe("a cat", **CALL)
    assert times.calls["transformer"] == 1 and "_call_impl" not in vars(pipe.transformer)


def test_a_call_that_is_replaced_meanwhile_stays():
    """As enabling or disabling context parallelism does."""
    pipe = make("wan")
    vars(pipe.transformer)["_call_impl"] = before = pipe.transformer._call_impl
    with component_times(pipe):
        assert vars(pipe.transformer).pop("_call_impl") is not before
        vars(pipe.text_encoder)["_call_impl"] = after = functools.partial(pipe.text_encoder._call_impl)
    assert "_call_impl" not in vars(pipe.transformer) and vars(pipe.text_encoder)["_call_impl"] is after


def test_what_is_refused():
    pipe = make("wan")
    with pytest.raises(AttentionProviderError, match="a diffusers pipeline is accepted"):
        component_times(pipe.transformer).__enter__()
    pipe.transformer.compile()
    with pytest.raises(AttentionProviderError, match=r"apply_compile\(pipe.transformer\)"):
        component_times(pipe).__enter__()
