"""The provider that "auto" chooses, and the reason that it gives."""

import pytest
import torch
from torch.nn.attention.bias import causal_upper_left

from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    ProviderUnavailableError,
    attention_dispatch,
    attention_provider,
)
from diffusers_attn.dispatch import explain
from diffusers_attn.masks import MaskKind
from diffusers_attn.providers import registry, selection, speeds
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.registry import ProviderStatus
from diffusers_attn.providers.serving import CallProperties, refusal

CALL = CallProperties(
    torch.device("cpu"), torch.float32, 64, 64, 8, 8, "equal", False, MaskKind.NONE, False, False, False, False, ()
)  # fmt: skip


def test_on_a_cpu_it_is_native_and_says_why():
    chosen = selection.select(CALL)
    assert chosen.serving.provider == "native"
    assert str(chosen).startswith(
        "native: the first that supports the call in the fixed order for calls not measured on cpu"
    )


def test_what_native_cannot_do_goes_to_who_can():
    chosen = selection.select(CALL._replace(mask_kind=MaskKind.BLOCK))
    assert chosen.serving.provider == "flex"
    name, why = chosen.passed_over[0]
    assert name == "native" and why.startswith("it accepts no block mask")


def test_nobody_can():
    with pytest.raises(AttentionProviderError, match="no attention provider usable here.*flex: it has no backward"):
        selection.select(CALL._replace(mask_kind=MaskKind.BLOCK, needs_grad=True))


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a Hopper GPU and every package, as far as a decision sees it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        registry,
        "status_without_download",
        lambda name, source: ProviderStatus(name, name != "flash_3", "absent", None, "1", ""),
    )
    kept = dict(registry.ADAPTERS)

    def load(name, source="package"):
        from diffusers_attn.providers.base import Adapter

        return kept.get((name, source), Adapter)

    monkeypatch.setattr(registry, "load", load)
    return CALL._replace(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=128, value_head_dim=128)


def test_measured_speeds_decide(hopper):
    from diffusers_attn.providers.speeds import MEASURED

    exact = {name: speed for name, speed in MEASURED[(9, 0), 128].items() if "sage" not in name}
    for long in (False, True):
        fastest = max(exact, key=lambda name: exact[name][long])
        chosen = selection.select(hopper._replace(long=long))
        assert chosen.serving.provider == fastest
        assert "TFLOP/s measured on sm_90 with head_dim 128" in chosen.reason


def test_lossy_ones_only_by_name(hopper):
    assert ("sage", "lossy, and not named in lossy=...") in selection.select(hopper._replace(long=True)).passed_over
    chosen = selection.select(hopper._replace(long=True, options=(("lossy", ("sage",)),)))
    assert chosen.serving.provider == "sage"
    with_gradient = hopper._replace(long=True, needs_grad=True, options=(("lossy", ("sage",)),))
    assert selection.select(with_gradient).serving.provider != "sage"


def test_lossy_ones_that_are_named_and_not_measured_come_first(hopper, monkeypatch):
    """They are named for their speed. On a device without measurements they were never chosen."""
    call = hopper._replace(options=(("lossy", ("flash_3_fp8", "sage")),))
    chosen = selection.select(call)
    assert chosen.serving.provider == "flash_3_fp8"
    assert chosen.reason == "named in lossy=..., and not measured on sm_90 with head_dim 128 and short sequences"
    assert selection.select(call._replace(mask_kind=MaskKind.DENSE)).serving.provider not in ("flash_3_fp8", "sage")
    assert selection.select(call._replace(needs_grad=True)).serving.provider == "_native_cudnn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert selection.select(call).serving.provider == "sage"
    assert selection.select(call._replace(options=())).serving.provider == "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    assert selection.select(call._replace(options=(("lossy", ("sage_3",)),))).serving.provider == "sage_3"


def test_a_part_of_a_ring_goes_to_who_can_merge(hopper, monkeypatch):
    lossy = hopper._replace(mask_kind=MaskKind.KEY, options=(("lossy", ("sage_varlen",)),), partial=True)
    with monkeypatch.context() as patch:
        patch.setitem(speeds.MEASURED, ((9, 0), 128), {"sage_varlen": (999, 999), "flash": (1, 1)})
        assert selection.select(lossy._replace(partial=False)).serving.provider == "sage_varlen"
        chosen = selection.select(lossy)
    assert chosen.serving.provider == "flash"
    assert dict(chosen.passed_over)["sage_varlen"].startswith("it returns no log-sum-exp")
    assert refusal(SPECS["flex"], hopper._replace(partial=True, needs_grad=True)).startswith("it has no backward for a")
    assert not refusal(SPECS["flex"], hopper._replace(partial=True))


def test_a_mask_and_float32_are_followed(hopper):
    biased = selection.select(hopper._replace(mask_kind=MaskKind.BIAS))
    assert biased.serving.provider in ("_native_cudnn", "_native_efficient", "native")
    in_float32 = selection.select(hopper._replace(dtype=torch.float32))
    assert in_float32.serving.provider == "native" and "not measured" in in_float32.reason


def test_it_says_what_it_would_pick_and_why():
    query = torch.randn(1, 2, 5, 8)
    assert "native: the first that supports the call" in str(explain(query, query, query))
    assert explain(query.double(), query.double(), query.double()).serving.provider == "native"
    assert explain(query, query, query, causal_upper_left(5, 5)).serving.causal == "kernel"
    with pytest.raises(AttentionProviderError, match=r"four dimensions, \[batch, seq, heads, head_dim\]"):
        explain(query[0], query[0], query[0], layout="bshd")
    with pytest.raises(AttentionProviderError, match="2 query heads do not divide|one number of heads"):
        explain(query, query[:, :1].expand(1, 3, 5, 8), query[:, :1].expand(1, 3, 5, 8))


def test_auto_serves_calls():
    query = torch.randn(1, 2, 5, 8)
    with attention_provider("auto"):
        out = attention_dispatch(query, query, query)
    assert torch.equal(out, attention_dispatch(query, query, query))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine on which sage cannot run")
@pytest.mark.parametrize("lossy", ["sage", ("sage",), ("sage_varlen", "sage")])
@pytest.mark.parametrize("make", [attention_provider, DispatchProcessor])
def test_a_lossy_provider_that_cannot_be_used_is_refused(make, lossy):
    with pytest.raises(ProviderUnavailableError, match="'sage.*' cannot be used here: .*Install it with `pip"):
        make("auto", lossy=lossy)


@pytest.mark.parametrize("exact", ["native", ("flash", "sage"), "auto"])
def test_only_lossy_providers_are_named_as_lossy(exact):
    with pytest.raises(AttentionProviderError, match="exact.*'auto' chooses among all exact providers anyway"):
        DispatchProcessor("auto", lossy=exact)
