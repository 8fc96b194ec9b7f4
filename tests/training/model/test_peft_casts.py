"""Without PEFT's casts, LoRA under autocast gives the same bits with fewer copies."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn.training.loop import train_step
from diffusers_attn.training.model.lora import adapter_config
from diffusers_attn.training.model.peft_casts import castless_layers, without_casts

from ..runs import train
from ..worlds import forget_accelerate


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


class Copies(TorchDispatchMode):
    """Counts copies to another dtype."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def layers(kind, dropout=0.0, base=None):
    """A linear layer and a convolution in bfloat16 with adapters in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 4, 3)).bfloat16()
    if base == "int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model[0], quantization.Int8WeightOnlyConfig())
    model.requires_grad_(False)
    targets = ["0"] if kind in ("oft", "ia3") or base else ["0", "2"]
    inject_adapter_in_model(adapter_config(kind, 4, None, targets, dropout=dropout), model)
    trained = [each for each in model.parameters() if each.requires_grad]
    for each in trained:
        each.data = torch.randn(each.shape)
    return model, trained


def step(model, trained):
    """The loss, the gradients and the number of copies of a forward and a backward pass under autocast."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
        grads = torch.autograd.grad(loss, [x, *trained])
    return [loss.detach(), *grads], copies.number


@pytest.mark.parametrize(("kind", "base"), [("lora", None), ("rslora", None), ("lora", "int8")])
def test_the_same_bits_with_fewer_copies(kind, base):
    model, trained = layers(kind, base=base)
    expected, usual = step(model, trained)
    found = castless_layers(model)
    with without_casts(found):
        ours, fewer = step(model, trained)
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))
    assert len(found) >= 1 and fewer <= usual - 2 * len(found), "does PEFT cast elsewhere now?"
    assert step(model, trained)[1] == usual


@pytest.mark.parametrize(
    ("kind", "dropout"), [("dora", 0), ("lora", 0.5), ("loha", 0), ("lokr", 0), ("oft", 0), ("ia3", 0)]
)
def test_others_keep_their_casts(kind, dropout):
    model, _ = layers(kind, dropout)
    assert castless_layers(model) == []


def test_dora_would_change():
    """Otherwise its casts could be left out as well."""
    model, trained = layers("dora")
    expected, _ = step(model, trained)
    with without_casts([each for each in model.modules() if hasattr(each, "lora_variant")]):
        assert not all(a.equal(b) for a, b in zip(step(model, trained)[0], expected))


def test_a_run_has_the_same_bits(settings_of, monkeypatch):
    """The casts are left out in its steps, backward passes included, and nowhere else."""
    settings = {"steps": 2, "mixed_precision": "bf16", "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
    given = []

    @contextlib.contextmanager
    def watched(those):
        with without_casts(those):
            yield
            given.append([each.cast_input_dtype_enabled for each in those])
        assert all(each.cast_input_dtype_enabled for each in those)

    monkeypatch.setattr(train_step, "without_casts", watched)
    ours = train(settings_of("cogview4", **settings))
    assert [any(flags) for flags in given] == [False, False] and given[0]
    forget_accelerate()
    monkeypatch.setattr(train_step, "castless_layers", lambda model: [])
    theirs = train(settings_of("cogview4", **settings))
    assert given[2] == [] and ours["steps"] == theirs["steps"]
    weights, expected = (load_file(Path(each["path"])) for each in (ours, theirs))
    assert all(weights[name].equal(expected[name]) for name in expected)


def test_without_autocast_they_stay(settings_of, monkeypatch):
    monkeypatch.setattr(train_step, "castless_layers", lambda model: pytest.fail("they are needed"))
    train(settings_of("cogview4", steps=1, gradient_accumulation_steps=1))
