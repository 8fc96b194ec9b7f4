"""Saving, loading, copying: nothing of the binding is in a checkpoint."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import pytest
import torch

from diffusers_attn import DispatchProcessor
from diffusers_attn.processors import attention_modules

from .. import launching
from ..zoo import CASES, relative_change
from . import ip_adapters


@torch.no_grad()
def test_what_is_saved_is_diffusers_own(tmp_path):
    case = CASES["flux"]
    model = case.build()
    ip_adapters.load_flux(model)
    for folder, bind in (("plain", False), ("bound", True)):
        if bind:
            model.set_attn_processor(DispatchProcessor("native"))
        model.save_pretrained(tmp_path / folder)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "bound" / name).read_bytes()


@torch.no_grad()
def test_a_saved_model_comes_back_unbound(tmp_path):
    case = CASES["sd3"]
    model: Any = case.build()
    expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("_native_math"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {module.provider for module in attention_modules(loaded)} == {None}
    assert relative_change(loaded(**case.inputs()), expected) == 0


@torch.no_grad()
def test_state_dicts_fit_both_ways():
    case = CASES["flux"]
    model, bound = case.build(seed=1), case.build()
    bound.set_attn_processor(DispatchProcessor("native"))
    bound.load_state_dict(model.state_dict())
    assert relative_change(bound(**case.inputs()), model(**case.inputs())) < 1e-6
    model.load_state_dict(bound.state_dict())


@pytest.mark.slow
def test_the_first_line_of_a_process(tmp_path):
    """It may bind a model of any class: Python looks `set_attn_processor` up before it makes the processor, and these
    classes do not have it. And it may load a bound model from a pickle."""
    model = CASES["cogview4"].build()
    model.set_attn_processor(DispatchProcessor("_native_math"))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = """
import os, pickle, sys
from pathlib import Path
import diffusers
from diffusers.models.attention_processor import Attention, MochiAttention

# Two processes that have imported diffusers, and nothing of diffusers_attn.
if child := os.fork():
    os.waitpid(child, 0)
    model = pickle.loads(Path(sys.argv[1]).read_bytes())
    from diffusers_attn.processors import attention_modules
    print(*{module.provider for module in attention_modules(model)})
    sys.exit()

import diffusers_attn
from diffusers.models.modeling_utils import ModelMixin
plain = Attention.set_processor
assert not hasattr(MochiAttention, "set_processor") and not hasattr(ModelMixin, "set_attn_processor")
from diffusers_attn import DispatchProcessor
sizes = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4)
model = diffusers.CogView4Transformer2DModel(**sizes, text_embed_dim=8, time_embed_dim=8, condition_dim=4)
model.set_attn_processor(DispatchProcessor("native"))
from diffusers_attn.processors import attention_modules
print(*{module.provider for module in attention_modules(model)})
"""
    result = launching.run([sys.executable, "-c", script, tmp_path / "model.pickle"], check=True)
    assert result.stdout.split() == ["native", "_native_math"]
