"""Gradients of a bound model are those of the model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from diffusers_attn import DispatchProcessor, attention_provider

from ..zoo import CASES, outputs


def gradients(model, case):
    model.zero_grad()
    sum(tensor.float().square().mean() for tensor in outputs(model(**case.inputs()))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(ours, theirs):
    assert ours.keys() == theirs.keys() and theirs
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "wan_i2v", "sdxl", "cogvideox", "qwenimage", "mochi", "ltx"])
def test_with_and_without_checkpointing(name, routed):
    case = CASES[name]
    model = case.build().train()
    expected = gradients(model, case)
    model.set_attn_processor(DispatchProcessor("_native_math"))
    assert same(gradients(model, case), expected)
    calls, _ = len(routed), routed.clear()
    model.enable_gradient_checkpointing()
    assert same(gradients(model, case), expected)
    assert calls < len(routed) <= 2 * calls  # forward, and again in the backward
    assert set(routed) == {"_native_math"}


def test_the_scope_of_the_forward_covers_what_is_recomputed(routed):
    case = CASES["sd3"]
    model = case.build().train()
    model.enable_gradient_checkpointing()
    expected = gradients(model, case)
    model.set_attn_processor(DispatchProcessor("native"))
    with attention_provider("_native_math"):
        assert same(gradients(model, case), expected)
    assert set(routed) == {"_native_math"}


def test_lora_trains_alike():
    case = CASES["flux"]
    trained = []
    for bound in (False, True):
        torch.manual_seed(0)
        model = case.build()
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        if bound:
            model.set_attn_processor(DispatchProcessor("native"))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            gradients(model, case)
            optimizer.step()
        trained.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    assert trained[0].norm() > 0
    assert torch.allclose(*trained, atol=1e-6)
