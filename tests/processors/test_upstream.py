"""What we rely on in diffusers and PyTorch. If one of these fails after an upgrade, it says what has moved."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
from types import CodeType

import diffusers.models
import pytest
import torch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.modeling_utils import ModelMixin

from diffusers_attn.processors import binding
from diffusers_attn.processors.bound import obstacle
from diffusers_attn.processors.entry_points import dispatch_entry_point, sdpa_entry_point


def parameters(function):
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_arguments_of_dispatch_attention_fn():
    assert parameters(dispatch_entry_point(None)) == parameters(dispatch_attention_fn), (
        "diffusers' dispatch_attention_fn has other arguments than the placeholder in entry_points.py"
    )
    assert AttentionBackendName.FLEX == "flex", "entry_points.py compares the backend that models ask for with 'flex'"


def test_arguments_of_scaled_dot_product_attention():
    names = [name for name, _, _ in parameters(sdpa_entry_point(None))]
    documented = torch.nn.functional.scaled_dot_product_attention.__doc__.strip().split(")")[0]
    found = [argument.split("=")[0].strip() for argument in documented.split("(")[1].split(",")]
    assert names == [name for name in found if name != "*"]


@pytest.mark.parametrize("cls", [Attention, AttentionModuleMixin], ids=lambda cls: cls.__name__)
def test_set_processor(cls):
    upstream = inspect.unwrap(cls.set_processor)
    assert upstream is not cls.set_processor, f"{cls.__name__}.set_processor is not patched"
    assert [name for name, _, _ in parameters(upstream)] == ["self", "processor"]
    assert {"processor", "_modules"} <= set(upstream.__code__.co_names), "it no longer sets self.processor"
    assert callable(cls.get_processor)


def test_mochi_attention():
    assert vars(MochiAttention)["set_processor"] is Attention.set_processor
    assert not issubclass(MochiAttention, (Attention, AttentionModuleMixin)), "binding.py need not patch it any more"


def test_set_attn_processor():
    upstream = inspect.unwrap(AttentionMixin.set_attn_processor)
    assert upstream is not AttentionMixin.set_attn_processor, "AttentionMixin.set_attn_processor is not patched"
    inner = [constant.co_name for constant in upstream.__code__.co_consts if isinstance(constant, CodeType)]
    assert inner == ["fn_recursive_attn_processor"] and set(inner) <= binding._SETTERS, (
        "the functions between who sets a processor and set_processor have other names: see binding._SETTERS"
    )
    assert ModelMixin.set_attn_processor is AttentionMixin.set_attn_processor


def test_models_with_a_set_attn_processor_of_their_own():
    """Imported before us or after: what they do with a DispatchProcessor is what all do."""
    own = [
        cls
        for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models.")
        if info.name.split(".")[2] in ("transformers", "unets", "controlnets")
        for cls in vars(importlib.import_module(info.name)).values()
        if isinstance(cls, type)
        and issubclass(cls, ModelMixin)
        and cls is not ModelMixin
        and "set_attn_processor" in vars(cls)
    ]
    assert {cls.__name__ for cls in own} == {"HunyuanDiT2DControlNetModel"}
    for cls in own:
        assert inspect.unwrap(cls.set_attn_processor) is not cls.set_attn_processor


def processors():
    """Every attention processor class of the models in diffusers, by name."""
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        with contextlib.suppress(ImportError):  # flax, and whatever else is not installed
            for name, cls in vars(importlib.import_module(module.name)).items():
                if isinstance(cls, type) and re.search("Attn.*Processor", name) and "__call__" in vars(cls):
                    yield name, cls


# Processors that cannot be bound: they compute scores themselves, call xformers, or are linear attention.
SCORES = {"Attn", "AttnAddedKV", "CustomDiffusionAttn", "IPAdapterAttn", "SlicedAttn", "SlicedAttnAddedKV"}
XFORMERS = {
    "CustomDiffusionXFormersAttn",
    "IPAdapterXFormersAttn",
    "XFormersAttn",
    "XFormersAttnAddedKV",
    "XFormersJointAttn",
}
LINEAR = {
    "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor3_0",
    "SanaMultiscaleAttnProcessor2_0",
}


def test_every_processor_can_be_bound_or_is_known_not_to():
    classes = dict(processors())
    assert len(classes) > 100
    obstacles = {name: obstacle(object.__new__(cls)) for name, cls in classes.items()}
    blocked = {name: reason for name, reason in obstacles.items() if reason is not None}
    known = {f"{name}Processor" for name in SCORES | XFORMERS} | LINEAR
    assert set(blocked) == known, "processors that call attention in a way that is new to us, or in a known way again"
    for name in SCORES:
        assert blocked[f"{name}Processor"].endswith("it computes the scores itself, with get_attention_scores")
    for name in XFORMERS:
        assert blocked[f"{name}Processor"].endswith("it calls xformers itself")
