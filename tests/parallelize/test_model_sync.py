"""When the values of a model's adapters are read again."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear

from diffusers_attn.parallelize import model_sync

from .test_enable import build


@pytest.fixture
def model():
    model = build("flux")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return model


@pytest.fixture
def readings(monkeypatch):
    """One entry for each time the values are read."""
    found = []
    summed = model_sync._checksums_of
    monkeypatch.setattr(model_sync, "_checksums_of", lambda weights: found.append(None) or summed(weights))
    return found


def moved(model):
    """As offloading moves weights."""
    for each in model.modules():
        if isinstance(each, Linear):
            for parameter in each.lora_A.parameters():
                parameter.data = parameter.data.clone()


def test_weights_that_only_move_are_not_read_for_ever(model, readings):
    adapters, keep = model_sync.Adapters(model), []
    described = adapters.describe(in_training=False)
    for _ in range(20):
        keep += [parameter.data for parameter in model.parameters()]  # so that no address is used again
        moved(model)
        assert adapters.describe(in_training=False) == described
    assert 2 <= len(readings) <= 6


def test_an_adapter_that_takes_the_place_of_another_is_read(model, readings):
    adapters = model_sync.Adapters(model)
    assert "adapter 'default'" in adapters.describe(in_training=False)
    model.delete_adapters("default")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "other")
    described = adapters.describe(in_training=False)
    assert "weights none" not in described["adapter 'other'"] and len(readings) == 2


def test_training_reads_nothing(model, readings):
    adapters = model_sync.Adapters(model)
    adapters.describe(in_training=True)
    adapters.may_have_changed()
    with torch.no_grad():
        next(each for each in model.parameters() if each.requires_grad).mul_(2)
    moved(model)
    adapters.describe(in_training=True)
    assert len(readings) == 1
    adapters.describe(in_training=False)
    assert len(readings) == 2
