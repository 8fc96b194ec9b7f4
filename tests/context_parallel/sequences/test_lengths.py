"""What a module is told of how long its sequence is: numbers, arguments that tell it, and bases of logarithms; and how
many heads there are to share.
"""

import math

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError, CPInput, ParamId
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh
from diffusers_attn.cp_plans import advanced
from diffusers_attn.parallelize.targets import find_targets, split_heads
from tests.zoo import CASES

from ..hooks.test_plan_words import mesh_of


class Recorder(nn.Module):
    def forward(self, tokens=None, shapes=None, base=None):
        return tokens, shapes, base


def test_an_argument_may_tell_a_length():
    """The first sequence is then what the other leaves."""
    plan = {
        "": {
            "shapes": advanced.CPLength("image", of=lambda shapes: math.prod(shapes[-1])),
            "tokens": CPInput(1, sequence=("text", "image")),
        }
    }
    module = Recorder()
    tracker = apply_context_parallel(module, mesh_of(1), plan)
    shapes = [(1, 2), (2, 3)]
    tokens, given, _ = module(torch.arange(11)[None], shapes)
    assert given is shapes and tracker.lengths == {"image": 6, "text": 5}
    assert tokens.tolist() == [[2, 3, 7, 8]]


def test_all_tensors_of_a_dict_are_split():
    module = Recorder()
    apply_context_parallel(module, mesh_of(1), {"": {"tokens": CPInput(1)}})
    tokens, _, _ = module({3: torch.arange(7)[None], 5: torch.arange(7)[None] * 10})
    assert {name: each.tolist() for name, each in tokens.items()} == {3: [[3, 4]], 5: [[30, 40]]}


@pytest.mark.parametrize("base", [9, 7.5])
def test_a_logarithm_of_the_shard_is_that_of_the_whole(base):
    for rank, own in enumerate((12, 12, 11)):
        module = Recorder()
        plan = {"": {"tokens": CPInput(1, sequence="image"), ParamId("base"): advanced.CPLogBase("image")}}
        apply_context_parallel(module, mesh_of(rank), plan)
        tokens, _, given = module(torch.arange(35)[None], base=base)
        assert tokens.shape[1] == own
        assert math.log(own, given) == pytest.approx(math.log(35, base), rel=1e-14)
        assert module(torch.arange(35)[None])[2] is None
        with pytest.raises(AttentionProviderError, match="'image' has 5 tokens for 3 ranks.*fewer ranks"):
            module(torch.arange(5)[None], base=base)  # on all ranks, though the last alone has one token


def test_without_other_ranks_the_base_is_as_it_was():
    module = Recorder()
    mesh = ContextParallelMesh(ContextParallelConfig(), ALONE, ALONE)
    apply_context_parallel(
        module, mesh, {"": {"tokens": CPInput(1, sequence="image"), "base": advanced.CPLogBase("image")}}
    )
    assert module(torch.arange(1)[None], base=9)[2] == 9


@pytest.mark.parametrize(
    ("name", "heads"), [("krea2", 2), ("ideogram4", 4), ("cosmos3", 2), ("ace_step", 2), ("lumina2", 2), ("zimage", 4)]
)
def test_heads_are_counted_whatever_a_class_calls_them(name, heads):
    (target,), _ = find_targets(CASES[name].build(), None)
    assert heads in split_heads(target)
