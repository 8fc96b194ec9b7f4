"""Plans applied to modules: what is split and gathered, what is refused, and that removing restores the module."""

import collections
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.comm.transport import Transport
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import (
    add_mesh,
    applied_tracker,
    apply_context_parallel,
    names_of_groups,
    remove_context_parallel,
    using_mesh,
)
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.active import active
from diffusers_attn.context_parallel.sequences.roles import Role
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, CPOutput, ParamId
from diffusers_attn.cp_plans.registry import get_cp_plan, list_cp_plans, register_cp_plan

# The second of three ranks. Splitting needs no other rank, so that these tests need no processes.
MESH = ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE)
SINGLE = ContextParallelMesh(ContextParallelConfig(), ALONE, ALONE)


class Recorder(nn.Module):
    """Gives back what reaches it."""

    def forward(self, hidden_states, context=None, rotary=None, *, extra=None, **kwargs):
        return {"hidden_states": hidden_states, "context": context, "rotary": rotary, "extra": extra, **kwargs}


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, context=None):
        for layer in self.layers:
            x = layer(x) if context is None else layer(x, context)
        return x


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.seen = []

    def forward(self, x, context=None):
        self.seen.append((x.shape[1], None if context is None else context.shape[1]))
        for each in self.inner:
            x = each(x)
        return x


def tokens(length, *more):
    return torch.arange(length, dtype=torch.float32).view(1, length, *[1] * len(more)).expand(1, length, *more)


def test_arguments_are_found_by_name_and_by_place():
    plan = {
        "": {
            ParamId("hidden_states", 0): CPInput(1, 2),
            ParamId(index=1): CPInput(1),
            ParamId(index=-1): CPInput(1),
            ParamId("extra"): CPInput(1),
            "of_kwargs": CPInput(1),
        }
    }
    module = Recorder()
    apply_context_parallel(module, MESH, plan)
    for out in (
        module(tokens(8), tokens(5), tokens(6), extra=tokens(3), of_kwargs=tokens(4)),
        module(hidden_states=tokens(8), context=tokens(5), rotary=tokens(6), extra=tokens(3), of_kwargs=tokens(4)),
    ):
        assert out["hidden_states"].tolist() == [[3, 4, 5]]
        assert out["context"].tolist() == [[2, 3]]
        assert out["rotary"].tolist() == [[2, 3]]
        assert out["extra"].tolist() == [[1]]
        assert out["of_kwargs"].tolist() == [[2]]
    assert module(tokens(8))["context"] is None  # what is absent stays so


Pair = collections.namedtuple("Pair", "cos sin")


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (CPInput(1), (tokens(8), tokens(8))),
        ([CPInput(1), CPInput(1)], [tokens(8), tokens(8)]),
        ((CPInput(1), None), (tokens(8), tokens(9))),
        ([CPInput(1), CPInput(1)], Pair(tokens(8), tokens(8))),
        ({"cos": CPInput(1)}, {"cos": tokens(8), "other": 3}),
        ([[CPInput(1), CPInput(1)], CPInput(1)], ((tokens(8), tokens(8)), [tokens(8)])),
    ],
)
def test_nested_arguments_stay_what_they_were(spec, value):
    module = Recorder()
    apply_context_parallel(module, MESH, {"": {ParamId("rotary"): spec}})
    found = module(tokens(1), rotary=value)["rotary"]
    assert type(found) is type(value)

    def lengths(item):
        if isinstance(item, torch.Tensor):
            return item.shape[1]
        if isinstance(item, dict):
            return {name: lengths(each) for name, each in item.items()}
        return [lengths(each) for each in item] if isinstance(item, (list, tuple)) else item

    def expected(item):
        if isinstance(item, list):
            return [expected(each) for each in item]
        if isinstance(item, dict):
            return {name: expected(each) for name, each in item.items()}
        return 3 if item == 8 else item

    assert lengths(found) == expected(lengths(value))


def test_outputs_are_split_where_the_plan_says():
    class Rope(nn.Module):
        def forward(self, x):
            return x, x + 1

    rope = Rope()
    apply_context_parallel(rope, MESH, {"": {ParamId(index=0): CPInput(1, split_output=True)}})
    cos, sin = rope(tokens(8))
    assert cos.shape == (1, 3) and sin.shape == (1, 8)

    recorder = Recorder()
    apply_context_parallel(recorder, MESH, {"": {"context": CPInput(1, split_output=True, sequence="text")}})
    out = recorder(tokens(8), tokens(8))
    assert out["hidden_states"].shape == (1, 8) and out["context"].shape == (1, 3)
    assert applied_tracker(recorder).lengths == {"text": 8}


def test_stars_and_numbers_name_modules():
    blocks = [Add() for _ in range(3)]
    model = Layers(blocks)
    plan = {
        "layers.*": {ParamId("context"): CPInput(1, 2)},
        "layers.0": {ParamId("x"): CPInput(1, 2)},
        "layers.*.inner.*": {ParamId(index=0): CPInput(1, leave_other_dims=True, expected_dims=5)},
        "layers.-1": {ParamId(index=0): CPInput(1, 2, split_output=True)},
    }
    apply_context_parallel(model, MESH, plan)
    out = model(tokens(8), tokens(5))
    assert [block.seen for block in blocks] == [[(3, 2)]] * 3
    assert out.shape == (1, 1)
    assert all(len(inner._forward_pre_hooks) == 1 for block in blocks for inner in block.inner)
    assert len(blocks[2]._forward_hooks) == 1


def hook_state(module):
    return [
        {name: dict(value) for name, value in vars(each).items() if "hooks" in name and isinstance(value, dict)}
        for each in module.modules()
    ]


def test_removal_leaves_nothing():
    model = Layers([Add(), Add()])
    before, attributes = hook_state(model), [set(vars(each)) for each in model.modules()]
    plan = {
        "": {ParamId("x"): CPInput(1, 2)},
        "layers.*": {ParamId("context"): CPInput(1, 2)},
        "layers.1": [CPOutput(1, 2)],
        "layers.0": CPAttention(("x",)),
    }
    apply_context_parallel(model, MESH, plan)
    assert hook_state(model) != before
    assert names_of_groups(model) == [MESH.ring.name]
    with pytest.raises(AttentionProviderError, match="applied .* already"):
        apply_context_parallel(model, MESH, plan)
    remove_context_parallel(model)
    remove_context_parallel(model)
    assert hook_state(model) == before
    assert [set(vars(each)) for each in model.modules()] == attributes
    assert applied_tracker(model) is None
    assert names_of_groups(model) == []
    assert torch.equal(model(tokens(8), tokens(5)), tokens(8))


def test_removal_gives_compiled_modules_their_own_calls_back():
    """While a plan is applied, a wrapper marks sizes that change; see `dynamic_sizes`."""
    module = Layers([Add(), Add()])
    for layer in module.layers:
        layer.compile(backend="eager")
    own = [layer._compiled_call_impl for layer in module.layers]
    apply_context_parallel(module, MESH, {"": {ParamId("x", 0): CPInput(1, sequence="tokens")}})
    module(tokens(8))
    assert not any(layer._compiled_call_impl is call for layer, call in zip(module.layers, own))
    remove_context_parallel(module)
    assert all(layer._compiled_call_impl is call for layer, call in zip(module.layers, own))


def test_forwards_over_another_mesh():
    """As groups of ranks compute branches of guidance."""
    model = Layers([Add()])
    tracker = apply_context_parallel(model, MESH, {"": {ParamId("x", 0): CPInput(1, sequence="tokens")}})
    usual = tracker.transport
    add_mesh(model, SINGLE)
    with using_mesh(model, SINGLE):
        assert tracker.mesh is SINGLE and isinstance(tracker.transport, Transport)
        model(tokens(8))
    assert tracker.mesh is MESH and tracker.transport is usual
    model(tokens(8))
    assert [length for length, _ in model.layers[0].seen] == [8, 3]


def test_attention_modules_are_known_while_they_run():
    class Attention(nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.processor, self.inner, self.seen = None, nn.ModuleList(inner), []

        def forward(self, x):
            self.seen += [active.tracker, self.inner and [each(x) for each in self.inner], active.tracker]
            self.role = active.tracker and active.tracker.role
            return x

    model = Layers([Attention(Attention()), Attention()])
    first, second = model.layers
    tracker = apply_context_parallel(model, MESH, {"layers.0": CPAttention(("video",), key=())})
    model(tokens(4))
    assert first.seen[0] is first.seen[2] is second.seen[0] is first.inner[0].seen[0] is tracker
    assert first.role == Role(("video",), ()) and second.role is first.inner[0].role is None
    assert active.tracker is None
    remove_context_parallel(model)
    model(tokens(4))
    assert first.seen[3] is None


def test_after_an_error_nobody_takes_another_model_for_this_one():
    class Attention(nn.Module):
        processor = None

        def forward(self, x):
            if x.shape[1] == 3:
                raise ValueError("three")
            return x

    model = Layers([Attention()])
    tracker = apply_context_parallel(model, MESH, {"layers.0": CPAttention(("video",), key=())})
    with pytest.raises(ValueError, match="three"):
        model(tokens(3))
    assert active.tracker is None and tracker.role is None
    model(tokens(4))


def test_a_replaced_module_keeps_its_entry():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x, *args, **kwargs):
            return self.base(x)

    model, base = nn.Module(), nn.Linear(4, 4)
    model.proj, model.forward = base, lambda x: model.proj(x)
    apply_context_parallel(model, MESH, {"proj": {ParamId(index=0): CPInput(1, 3, split_output=True)}})
    assert model(torch.ones(1, 8, 4)).shape == (1, 3, 4)
    model.proj = Wrapper(base)
    assert model(torch.ones(1, 8, 4)).shape == (1, 3, 4)
    assert not base._forward_hooks and len(model.proj._forward_hooks) == 1
    model.proj = base
    assert model(torch.ones(1, 8, 4)).shape == (1, 3, 4)
    remove_context_parallel(model)
    assert model(torch.ones(1, 8, 4)).shape == (1, 8, 4) and not base._forward_hooks


def test_a_replaced_layer_of_each_block_keeps_its_entry():
    model = Layers([nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())])
    apply_context_parallel(model, SINGLE, {"layers.*.0": {ParamId(index=0): CPInput(1)}})
    before = [layer[0] for layer in model.layers]
    for layer in model.layers:
        layer[0] = nn.Dropout(0.0)
    model(tokens(8))
    assert [len(layer[0]._forward_pre_hooks) for layer in model.layers] == [1, 1]
    assert not any(each._forward_pre_hooks for each in before)


def test_a_model_is_not_kept_alive():
    model = Layers([Add()])
    apply_context_parallel(model, MESH, {"": {ParamId("x"): CPInput(1)}, "layers.0": CPAttention(("x",))})
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_module_with_a_plan_pickles():
    model = Layers([Add()])
    apply_context_parallel(model, MESH, {"layers.*": {ParamId("x"): CPInput(1)}})
    assert pickle.loads(pickle.dumps(model))(tokens(8)).shape == (1, 8)  # a copy is not split


def test_outputs_of_every_form_are_gathered():
    class Outputs(nn.Module):
        def forward(self, x, form):
            return {"tensor": x, "tuple": (x, x), "list": [x, None], "dict": {"sample": x}}[form]

    module = Outputs()
    plan = {"": {ParamId("x"): CPInput(1)}, "layer": CPOutput(1)}
    model = nn.Module()
    model.layer = module
    model.forward = lambda x, form: module(x, form)
    apply_context_parallel(model, SINGLE, plan | {"": {ParamId(index=0): CPInput(1)}})
    assert torch.equal(model(tokens(4), "tensor"), tokens(4))
    assert type(model(tokens(4), "tuple")) is tuple and type(model(tokens(4), "list")) is list
    assert torch.equal(model(tokens(4), "dict")["sample"], tokens(4))


REFUSED = {
    "no such module": ({"layers.7": {ParamId("x"): CPInput(1)}}, "has no '7'"),
    "no such name": ({"blocks.*": {ParamId("x"): CPInput(1)}}, "It has: layers"),
    "too negative": ({"layers.-3": {ParamId("x"): CPInput(1)}}, "has no '-3'"),
    "no such argument": ({"layers.0": {ParamId("y"): CPInput(1)}}, "has x, context"),
    "no such place": ({"layers.0": {ParamId(index=2): CPInput(1)}}, "number 2"),
    "a gather for an argument": ({"layers.0": {ParamId("x"): CPOutput(1)}}, "Accepted are"),
    "a split for an output": ({"layers.0": [CPInput(1)]}, "Accepted are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_does_not_fit_changes_nothing(case):
    plan, message = REFUSED[case]
    model = Layers([Add(), Add()])
    before = hook_state(model)
    with pytest.raises(AttentionProviderError, match=message):
        apply_context_parallel(model, MESH, {"layers.*": {ParamId("context"): CPInput(1)}} | plan)
    assert hook_state(model) == before and applied_tracker(model) is None


def test_wrong_dimensions_and_nesting_are_errors():
    module = Recorder()
    apply_context_parallel(module, MESH, {"": {"hidden_states": CPInput(1, 3), "rotary": [CPInput(1), CPInput(1)]}})
    with pytest.raises(AttentionProviderError, match=r"has 2 dimensions, \[1, 8\]; the plan expects 3"):
        module(tokens(8))
    with pytest.raises(AttentionProviderError, match="is a tuple of 3"):
        module(tokens(8, 2), rotary=(tokens(8),) * 3)
    with pytest.raises(ValueError, match="ParamId"):
        ParamId()


def test_lengths_say_what_attention_joins():
    tracker = SequenceTracker(MESH)
    assert tracker.attention(5, 5) is None  # nothing is split
    tracker.split("text", tokens(13), 1)  # 5, 4, 4
    tracker.split("image", tokens(35), 1)  # 12, 12, 11
    queries, keys, in_order = tracker.attention(16, 16)
    assert queries.sizes == keys.sizes == (17, 16, 15) and not in_order
    queries, keys, in_order = tracker.attention(12, 4)
    assert queries.total == 35 and keys.total == 13 and in_order
    assert tracker.attention(12, 77) is None  # replicated keys
    with pytest.raises(AttentionProviderError, match="mix"):
        tracker.attention(25, 25)  # 13 replicated ones and 12
    with pytest.raises(AttentionProviderError, match="mix"):
        tracker.attention(35, 4)


def test_what_a_rank_could_confuse_is_refused_on_all():
    for rank in range(3):
        tracker = SequenceTracker(ContextParallelMesh(ContextParallelConfig(3), Group("none", rank, 3), ALONE))
        tracker.shard_length("text", 2)  # 1, 1, 0: image alone and text with image look alike on rank 2
        tracker.split("image", tokens(9), 1)
        joint = tracker.shards(("text", "image"))
        with pytest.raises(AttentionProviderError, match="CPAttention"):
            tracker.attention(joint.sizes[rank], joint.sizes[rank])
        tracker.role = Role(("text", "image"), ("text", "image"))
        assert tracker.attention(joint.sizes[rank], joint.sizes[rank]) == (joint, joint, True)
        tracker.role = Role(("image",), ())
        assert tracker.attention(3, 3) is None


def test_plans_are_found_by_class():
    class Mine(Layers):
        pass

    with pytest.raises(AttentionProviderError, match="register_cp_plan\\('Mine'"):
        get_cp_plan(Mine([]))
    plan = {"layers.*": {ParamId("x"): CPInput(1)}}
    register_cp_plan(Layers, plan)
    try:
        assert get_cp_plan(Mine([])) is plan
        assert "Layers" in list_cp_plans() and "FluxTransformer2DModel" in list_cp_plans()
    finally:
        from diffusers_attn.cp_plans import registry

        del registry._plans["Layers"]
