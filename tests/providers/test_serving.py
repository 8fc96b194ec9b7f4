"""How a provider serves a call with causality, from its capabilities alone."""

import dataclasses

import pytest
import torch

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.decision import _lowerings, decide
from diffusers_attn.providers.serving import CallProperties, Serving, refusal, serving_of

CALL = CallProperties(
    torch.device("cpu"), torch.float32, 64, 64, 8, 8, "equal", False, MaskKind.NONE, False, False, False, False, ()
)  # fmt: skip
MERGED = {
    MaskKind.KEY: MaskKind.DENSE,
    MaskKind.DENSE: MaskKind.DENSE,
    MaskKind.KEY_BIAS: MaskKind.BIAS,
    MaskKind.BIAS: MaskKind.BIAS,
}
"""Kinds of masks, and the kind of mask that causality makes of them."""


@pytest.mark.parametrize("kind", MERGED)
def test_causality_is_merged_into_a_mask_of_its_kind(kind):
    served = serving_of(SPECS["native"], CALL._replace(mask_kind=kind, is_causal=True))
    assert (served.causal, served.mask_kind) == ("mask", MERGED[kind])
    served = serving_of(SPECS["native"], CALL._replace(mask_kind=kind))
    assert (served.causal, served.mask_kind) == ("none", kind)


@pytest.mark.parametrize("length", ["equal", "shorter", "longer"])
def test_a_causal_kernel_gets_the_lengths_that_it_aligns_as_asked(length):
    """PyTorch's kernels align causality to the upper left for all lengths, other kernels for equal ones alone."""
    call = CALL._replace(is_causal=True, query_len=length)
    assert SPECS["native"].capabilities.causal == "top_left"
    assert serving_of(SPECS["native"], call).causal == "kernel"
    square = dataclasses.replace(SPECS["native"].capabilities, causal="square")
    spec = dataclasses.replace(SPECS["native"], capabilities=square)
    assert serving_of(spec, call).causal == {"equal": "kernel", "shorter": "drop_keys", "longer": "two_calls"}[length]


def test_a_refusal_names_what_is_accepted():
    assert refusal(SPECS["flash"], CALL) == "it runs on cuda, not on cpu"
    assert refusal(SPECS["flash"], CALL._replace(device=torch.device("meta"))) == "it accepts bfloat16, float16"


def test_auto_and_the_meta_device():
    assert decide("auto", CALL._replace(mask_kind=MaskKind.BLOCK)).provider == "flex"
    assert decide("auto", CALL._replace(device=torch.device("meta"))).provider == "native"


def test_lowerings_in_words():
    assert _lowerings(Serving("native", "bhsd")) == ""
    found = _lowerings(Serving("native", "bhsd", repeat_kv=True, pad_head_dim=8, causal="mask"))
    assert found == "; key heads repeated, head_dim padded to 8, causality merged into the mask"
