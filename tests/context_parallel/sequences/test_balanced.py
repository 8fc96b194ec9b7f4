"""Balanced causal attention: each rank has a part of the front of a sequence and one of its back."""

import contextlib

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError, attention_dispatch
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.cp_plans import advanced
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, CPOutput

from ...verify_plan.on_pool import verify_on_pool
from ..hooks.test_plan_words import mesh_of, tracker_of
from ..models import MESHES, without_exchange

LENGTH, CHANNELS, HEADS = 13, 16, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.processor = None  # by which attention modules are known
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, mask=None):
        query, key, value = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = attention_dispatch(query, key, value, mask, is_causal=mask is None)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Causal(nn.Module):
    """What looks at places is given them. With a mask of keys it is not causal."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(2)])
        self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens, places, mask=None):
        x = tokens + places.sin()[..., None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


PLAN = {
    "": {
        "tokens": CPInput(1, 3, sequence="tokens", balanced=True),
        "places": CPInput(1, 2, sequence="tokens"),
    },
    "layers.*": CPAttention(("tokens",)),
    "head": CPOutput(1, 3, sequence="tokens"),
}
UNNAMED = {name: spec for name, spec in PLAN.items() if name != "layers.*"}


def make(masked=False, length=LENGTH):
    torch.manual_seed(0)
    model = Causal().double()
    inputs = {"tokens": torch.randn(2, length, CHANNELS).double(), "places": torch.arange(length).double()[None]}
    if masked:
        inputs["mask"] = (torch.rand(2, 1, 1, length) < 0.6).index_fill(-1, torch.tensor([0]), True)
    return model, inputs


def run(model, inputs):
    out = model(**inputs)
    return out.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(out.square().mean(), model.parameters())])


def compare(meshes, ring, ulysses, rotate_method, plan=PLAN, disabled=False, **made):
    """Largest differences of output and mean gradient to one process."""
    model, inputs = make(**made)
    expected = run(model, inputs)
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    tracker = apply_context_parallel(model, mesh, plan)
    with without_exchange() if disabled else contextlib.nullcontext():
        out, grad = run(model, inputs)
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    assert tracker.shards(("tokens",)) == Shards.zigzag(inputs["places"].shape[1], mesh.size)
    return [(one - other).abs().max().item() for one, other in zip((out, grad), expected)]


@pytest.mark.parametrize("mesh", MESHES)
def test_like_one_process(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    where = {"ring": ring, "ulysses": ulysses, "rotate_method": method}
    for case in ({}, {"masked": True}, {"length": ring * ulysses}, *([{"plan": UNNAMED}] if mesh == "ring 2" else [])):
        for errors in pool.run(ring * ulysses, compare, **where, **case):
            assert max(errors) < 1e-12, case
    for errors in pool.run(ring * ulysses, compare, disabled=True, **where):
        assert errors[0] > 1e-3


def test_verify_knows_the_parts(pool, tmp_path):
    model, inputs = make()
    model, inputs = model.float(), {name: each.float() for name, each in inputs.items()}
    report = verify_on_pool(pool, tmp_path, "Causal", PLAN, model, inputs, strategies=("ring",))
    assert report.ok, str(report)
    plan = {**PLAN, "": {"tokens": PLAN[""]["tokens"], "places": CPInput(1, 2, sequence="others")}}
    report = verify_on_pool(pool, tmp_path, "Causal", plan, model, inputs, strategies=("ring",))
    # The model adds both, before its first layer.
    assert not report.ok and report.difference.module == "" and "split alike" in report.difference.hint, str(report)


def test_what_needs_the_order_is_refused():
    tracker = tracker_of(0)
    tracker.balanced.add("tokens")
    with pytest.raises(AttentionProviderError, match="attention by blocks needs it in order. Leave balanced out"):
        tracker.keep_blocks("tokens", 4)
    heads = advanced.CPHeads("tokens", 3, {"input": (1, 2)}, output=(1, 2))
    for spec, name in ((advanced.CPHalo(1, 1, sequence="tokens"), "a CPHalo"), (heads, "a CPHeads")):
        model = nn.Sequential(nn.Identity())
        apply_context_parallel(model, mesh_of(0), {"": {"input": PLAN[""]["tokens"]}, "0": spec})
        with pytest.raises(AttentionProviderError, match=f"{name} needs it in order"):
            model(torch.zeros(1, 7, 3))
    with pytest.raises(ValueError, match="needs the name of its sequence"):
        CPInput(1, balanced=True)


def test_a_plan_that_splits_balanced_gives_each_rank_two_parts():
    size = 2
    model = nn.Sequential(nn.Identity())
    parts = []
    for rank in range(size):
        apply_context_parallel(model, mesh_of(rank, size), {"": {"input": PLAN[""]["tokens"]}})
        parts.append(model(torch.arange(8.0).view(1, 8, 1)).flatten().tolist())
        remove_context_parallel(model)
    assert parts == [[0, 1, 6, 7], [2, 3, 4, 5]]
