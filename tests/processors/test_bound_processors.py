"""A bound processor is the processor that it was, but for its attention call."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_processor import CROSS_ATTENTION_PROCESSORS, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

from diffusers_attn import DispatchProcessor
from diffusers_attn.processors.bound import BoundProcessor, bind, unbind
from diffusers_attn.scope import ProviderChoice

from ..zoo import CASES

NATIVE, MATH = ProviderChoice.of("native"), ProviderChoice.of("_native_math")


@pytest.fixture
def adapter():
    return FluxIPAdapterAttnProcessor(hidden_size=8, cross_attention_dim=4, num_tokens=[2], scale=1.0)


def test_it_passes_for_its_class():
    original = AttnProcessor2_0()
    bound = bind(original, NATIVE)
    assert isinstance(bound, AttnProcessor2_0) and isinstance(bound, BoundProcessor)
    assert bound.__class__ is AttnProcessor2_0 and bound.__class__ in CROSS_ATTENTION_PROCESSORS
    assert AttentionProcessorRegistry.get(bound.__class__)
    assert type(bound.__class__()) is AttnProcessor2_0
    assert inspect.signature(bound.__call__) == inspect.signature(original.__call__)
    assert unbind(bound) is original and unbind(original) is original


def test_binding_again():
    bound = bind(FluxAttnProcessor(), NATIVE)
    assert bind(bound, NATIVE) is bound
    again = bind(bound, MATH)
    assert again.original is bound.original and again.choice is MATH
    assert type(again) is type(bind(FluxAttnProcessor(), MATH)) is not type(bound)


def test_state_is_shared_with_the_original(adapter):
    bound = bind(adapter, NATIVE)
    bound.scale = [0.5]
    bound.to(torch.float64).requires_grad_(False)
    bound.register_buffer("extra", torch.ones(1))
    bound._attention_backend = "flex"
    assert adapter.scale == [0.5] and adapter._attention_backend == "flex"
    assert adapter.to_k_ip[0].weight is bound.to_k_ip[0].weight
    assert adapter.to_k_ip[0].weight.dtype == torch.float64 and not adapter.to_k_ip[0].weight.requires_grad
    assert list(adapter.state_dict()) == list(bound.state_dict())
    del bound.extra
    assert not hasattr(adapter, "extra")


def test_weights_of_a_processor_are_registered_once(adapter):
    model = CASES["flux"].build()
    attention = model.transformer_blocks[0].attn
    attention.set_processor(adapter)
    keys, parameters = list(model.state_dict()), len(list(model.parameters()))
    assert "transformer_blocks.0.attn.processor.to_k_ip.0.weight" in keys
    model.set_attn_processor(DispatchProcessor("native"))
    assert list(model.state_dict()) == keys and len(list(model.parameters())) == parameters
    model.to(torch.float64)
    assert adapter.to_v_ip[0].bias.dtype == torch.float64
    attention.set_processor(FluxAttnProcessor())
    assert "processor" not in dict(attention.named_children())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda bound: pickle.loads(pickle.dumps(bound))])
def test_copies_are_bound_and_separate(duplicate, adapter):
    bound = bind(adapter, MATH)
    twin = duplicate(bound)
    assert type(twin) is type(bound) and twin.choice is MATH and twin.original is not adapter
    twin.scale = [0.25]
    assert adapter.scale == [1.0] and twin.original.scale == [0.25]
    assert torch.equal(twin.to_k_ip[0].weight, adapter.to_k_ip[0].weight)


def test_following_the_scope_survives_copying():
    bound = pickle.loads(pickle.dumps(bind(FluxAttnProcessor(), None)))
    assert isinstance(bound, BoundProcessor) and bound.choice is None


class Base:
    def __call__(self, attn, hidden_states):
        return self.attend(hidden_states)

    def attend(self, tensor):
        return helper(tensor) + torch.nn.functional.relu(tensor)


class Mine(Base):
    def __init__(self):
        self.state = 1


def helper(tensor):
    return next(F.scaled_dot_product_attention(*[each] * 3) for each in (tensor,))


def test_processors_of_ones_own(routed):
    """Any class whose methods call attention: inherited ones, through helpers, in functions within functions."""
    bound, tensor = bind(Mine(), MATH), torch.randn(1, 2, 3, 4)
    assert bound.state == 1
    assert torch.allclose(bound(None, tensor), Mine()(None, tensor))
    assert routed == ["_native_math"]
    assert helper.__globals__["F"] is F and F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_tracebacks_point_into_the_original_source():
    bound = bind(FluxAttnProcessor(), NATIVE)
    assert bound.__call__.__code__ is FluxAttnProcessor.__call__.__code__
    assert bound.__call__.__globals__["__package__"] == "diffusers.models.transformers"
