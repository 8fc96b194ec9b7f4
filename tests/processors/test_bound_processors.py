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

from diffusers_attn import AttentionProviderError, DispatchProcessor
from diffusers_attn.processors.bound import BoundProcessor, bind, obstacle, unbind
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


class Breaks:
    """A processor that is compiled in parts, as those of modules with hooks."""

    def __call__(self, attn, hidden_states):
        query = hidden_states + 1
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(query, query, query)


def test_graphs_of_a_processor_are_not_those_of_its_bound_copy():
    """Dynamo stores graphs by code object, and their parts in the globals of the function that it compiled."""
    torch._dynamo.reset()
    tensor = torch.randn(1, 2, 4, 8)
    found = [torch.compile(each, backend="eager")(None, tensor) for each in (Breaks(), bind(Breaks(), NATIVE))]
    assert torch.allclose(*found)


def test_tracebacks_point_into_the_original_source():
    bound = bind(FluxAttnProcessor(), NATIVE)
    code, original = bound.__call__.__code__, FluxAttnProcessor.__call__.__code__
    assert (code.co_filename, code.co_firstlineno) == (original.co_filename, original.co_firstlineno)
    assert bound.__call__.__globals__["__package__"] == "diffusers.models.transformers"


class Scaled(FluxAttnProcessor):
    """How users extend a processor of diffusers: what is theirs around a call of `super()`."""

    factor = 2.0

    def __call__(self, *args, **rest):
        out = super().__call__(*args, **rest)
        return out * self.factor if isinstance(out, torch.Tensor) else (out[0] * self.factor, *out[1:])


class ScaledTwice(Scaled):
    def __call__(self, *args, **rest):
        return super(ScaledTwice, self).__call__(*args, **rest)  # noqa: UP008


class Counted:
    calls = 0

    def __call__(self, *args, **rest):
        type(self).calls += 1
        return super().__call__(*args, **rest)


class CountedAndScaled(Counted, ScaledTwice):
    pass


class ByName(FluxAttnProcessor):
    def __call__(self, attn, *args, **rest):
        return FluxAttnProcessor.__call__(self, attn, *args, **rest)


class ByNameOfADescendant(Scaled):
    def __call__(self, *args, **rest):
        return Scaled.__call__(self, *args, **rest)


class InAFunction(FluxAttnProcessor):
    def __call__(self, *args, **rest):
        return (lambda: super(InAFunction, self).__call__(*args, **rest))()


def noted(function):
    def wrapper(self, *args, **rest):
        self.notes = getattr(self, "notes", 0) + 1
        return function(self, *args, **rest)

    return wrapper


class Decorated(FluxAttnProcessor):
    @noted
    @torch.no_grad()
    def __call__(self, *args, **rest):
        return super().__call__(*args, **rest)


def local():
    base = FluxAttnProcessor

    class Local(base):
        def __call__(self, *args, **rest):
            return base.__call__(self, *args, **rest)

    return Local


EXTENDED = [Scaled, ScaledTwice, CountedAndScaled, ByName, ByNameOfADescendant, InAFunction, Decorated, local()]


@torch.no_grad()
@pytest.mark.parametrize("processor", EXTENDED, ids=lambda cls: cls.__name__)
def test_processors_that_extend_those_of_diffusers(processor, routed, own_calls):
    case = CASES["flux"]
    model = case.build()
    model.set_attn_processor(processor())
    expected = model(**case.inputs())[0]
    model.set_attn_processor(DispatchProcessor("_native_math"))
    with own_calls(model) as calls:
        out = model(**case.inputs())[0]
    assert torch.allclose(out, expected, atol=1e-5)
    assert calls == [] and set(routed) == {"_native_math"} and len(routed) == len(model.attn_processors)
    assert {each.__class__ for each in model.attn_processors.values()} == {processor}
    assert all(isinstance(each, FluxAttnProcessor) for each in model.attn_processors.values())


def test_an_extended_processor_is_not_changed_by_being_bound(routed):
    bound = bind(ScaledTwice(), MATH)
    assert [cls.__name__ for cls in ScaledTwice.__mro__] == ["ScaledTwice", "Scaled", "FluxAttnProcessor", "object"]
    assert type(pickle.loads(pickle.dumps(bound))) is type(bound) is not type(bind(ScaledTwice(), NATIVE))
    assert bind(unbind(bound), MATH).factor == 2.0 and unbind(bound).factor == 2.0


@torch.no_grad()
def test_an_extended_processor_compiles(fresh_compiler, routed):
    case = CASES["flux"]
    model = case.build()
    model.set_attn_processor(Scaled())
    expected = model(**case.inputs())[0]
    model.set_attn_processor(DispatchProcessor("native"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**case.inputs())[0], expected, atol=1e-5)


class Static(Base):
    @staticmethod
    def attend(tensor):
        return F.scaled_dot_product_attention(tensor, tensor, tensor)


class StaticByName(Static):
    def __call__(self, attn, hidden_states):
        return Static.attend(hidden_states)


class ClassMethod(Static):
    @classmethod
    def attend(cls, tensor):
        return super().attend(tensor)


class Mixed(Base):
    def attend(self, tensor):
        return super().attend(tensor) * 2


@pytest.mark.parametrize("processor", [Static, StaticByName, ClassMethod, Mixed], ids=lambda cls: cls.__name__)
def test_methods_of_every_kind(processor, routed):
    tensor = torch.randn(1, 2, 3, 4)
    assert torch.allclose(bind(processor(), MATH)(None, tensor), processor()(None, tensor))
    assert routed == ["_native_math"]


class Alone(FluxAttnProcessor):
    def __call__(self, attn, hidden_states, **rest):
        return hidden_states


class Stops(Scaled):
    """Between attention and what calls `super()`."""

    def __call__(self, attn, hidden_states, **rest):
        return hidden_states


class CallsWhatStops(Stops):
    def __call__(self, *args, **rest):
        return super().__call__(*args, **rest)


class Wraps:
    def __init__(self):
        self.inner = FluxAttnProcessor()

    def __call__(self, *args, **rest):
        return self.inner(*args, **rest)


class ByNameAndMore(FluxAttnProcessor):
    def __call__(self, *args, **rest):
        return FluxAttnProcessor.__call__(self, *args, **rest) if isinstance(self, FluxAttnProcessor) else None


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (Alone, "Alone calls neither .*nor a function, class or super.. that does"),
        (CallsWhatStops, "CallsWhatStops calls neither"),
        (Wraps, "such as self.inner.*derive Wraps from .* call super...__call__"),
        (ByNameAndMore, "FluxAttnProcessor.__call__.* are followed only if.*call super...__call__"),
    ],
)
def test_why_a_processor_of_ones_own_cannot_be_bound(processor, reason):
    model = CASES["flux"].build()
    model.set_attn_processor(processor())
    with pytest.raises(AttentionProviderError, match=reason):
        model.set_attn_processor(DispatchProcessor("native"))
    assert obstacle(processor()) is not None and type(bind(processor(), NATIVE)) is processor
