"""Modules that need whole sequences: their arguments are gathered, what they return is split again; and plans that say
several things of one module, or things of modules that only some models have."""

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.cp_plans import advanced
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, CPOutput, ParamId


class Choice(nn.Module):
    """The three largest of all tokens are doubled, in every channel; `others` are added."""

    processor = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.seen = []

    def forward(self, x, others=()):
        self.seen.append(x.shape[1])
        x = self.linear(x)
        chosen = x.topk(3, dim=1).indices
        return x.scatter_add(1, chosen, x.gather(1, chosen)) + sum(others)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.choice, self.last = nn.Linear(4, 4).double(), Choice(), nn.Linear(4, 4).double()

    def forward(self, x):
        x = self.first(x)
        return self.last(self.choice(x, others=[x, x * 2]))


def plan(sequence):
    split = CPInput(1, 3, sequence=sequence)
    return {
        "first": {ParamId(index=0): split},
        "choice": [
            {
                ParamId("x"): advanced.CPGatherInput(1, 3, sequence=sequence),
                ParamId("others"): advanced.CPGatherInput(1, 3, sequence=sequence),
                ParamId(index=0): CPInput(1, 3, split_output=True, sequence=sequence),
            },
            CPAttention(query=()),
        ],
        "last": CPOutput(1, 3, sequence=sequence),
        "refiner?.blocks.0": CPAttention(("image",)),
    }


def compared(meshes, ring, ulysses, tokens):
    mesh = meshes(ring, ulysses)
    torch.manual_seed(1)
    model, x = Model(), torch.randn(2, tokens, 4, dtype=torch.float64)
    results = []
    for split in (False, True):
        if split:
            apply_context_parallel(model, mesh, plan("image"))
        out = model(x)
        grad = torch.cat(
            [each.flatten() for each in torch.autograd.grad(out.square().mean(), list(model.parameters()))]
        )
        results.append((out.detach(), grad))
    (expected, expected_grad), (found, grad) = results
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    return (found - expected).abs().max().item(), (grad - expected_grad).abs().max().item(), model.choice.seen


@pytest.mark.parametrize(("ring", "ulysses", "tokens"), [(2, 1, 7), (2, 2, 3)])
def test_a_module_is_given_all_tokens(pool, ring, ulysses, tokens):
    arguments = {"ring": ring, "ulysses": ulysses, "tokens": tokens}
    for out, grad, seen in pool.run(ring * ulysses, compared, **arguments):
        assert out < 1e-12 and grad < 1e-12
        assert seen == [tokens, tokens]


# The second of three ranks. What needs no exchange needs no processes.
MESH = ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        self.blocks[1].attn2 = Choice()


def test_a_module_that_some_blocks_have():
    model = Blocks()
    apply_context_parallel(model, MESH, {"blocks.*.attn2?": CPAttention(("image",)), "norm?": [CPOutput(1)]})
    assert len(model.blocks[1].attn2._forward_pre_hooks) == 1
    for path in ("blocks.*.attn2", "blocks.*?.attn2", "blocks.0?.attn2"):
        with pytest.raises(AttentionProviderError, match="has no 'attn2'"):
            apply_context_parallel(Blocks(), MESH, {path: CPAttention(("image",))})


def test_of_a_dict_what_is_there_is_split():
    class Recorder(nn.Module):
        def forward(self, options):
            return options

    module, mask = Recorder(), torch.arange(8)[None]
    spec = {"mask": CPInput(1, 2, sequence="text"), "other": CPInput(1, 2, sequence="image")}
    apply_context_parallel(module, MESH, {"": {"options": spec}})
    assert {name: each.tolist() for name, each in module({"mask": mask}).items()} == {"mask": [[3, 4, 5]]}
    assert module({"scale": 2}) == {"scale": 2} and module({}) == {} and module(None) is None


def test_entries_that_are_not_understood():
    for entry in (
        {"x": advanced.CPGatherInput},
        [{"x": CPInput(1)}, "x"],
        [CPAttention(("x",)), CPInput(1)],
        advanced.CPGatherInput(1),
    ):
        with pytest.raises(AttentionProviderError, match="Accepted are"):
            apply_context_parallel(Choice(), MESH, {"": entry})
