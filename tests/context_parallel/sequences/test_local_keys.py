"""Keys without shards must be the same on all ranks, or the call is refused on all of them."""

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError, CPInput, CPOutput, ParamId, attention_dispatch, attention_provider
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.sequences import local_keys
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather

WIDTH, HEADS = 16, 4


def heads(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x, text, keys):
        x = x + attention_dispatch(heads(x), heads(x), heads(x)).transpose(1, 2).flatten(2)
        query, context = heads(x), {
            "the text": lambda: text,
            "every second token": lambda: x[:, ::2],
            "a token more": lambda: torch.cat([x, self.token], dim=1),
            "a token more, and its queries": lambda: torch.cat([x, self.token, self.token], dim=1),
            "the text, then tokens": lambda: x[:, :3] if self.late else text,
        }[keys]()  # fmt: skip
        if keys == "a token more, and its queries":
            query = heads(torch.cat([x, self.token], dim=1))
        out = attention_dispatch(query, heads(context), heads(context)).transpose(1, 2).flatten(2)
        return x + out[:, : x.shape[1]]

    late = False


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.proj_out = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, WIDTH)
        self.blocks[1].late = True

    def forward(self, x, text, keys):
        for block in self.blocks:
            x = block(x, text, keys)
        return self.proj_out(x)


PLAN = {"blocks.0": {ParamId("x"): CPInput(1, 3)}, "proj_out": CPOutput(1, 3)}
KEYS = ["every second token", "a token more", "a token more, and its queries", "the text, then tokens"]


def attended(mesh, keys, compiled, device="cpu", dtype=torch.float64, backend="aot_eager"):
    """The largest error of the outputs of two forwards, or the messages of the errors that they raise."""
    model = Model().to(device, dtype)
    x, text = (torch.randn(1, length, WIDTH).to(device, dtype) for length in (24, 5))
    with attention_provider("native"):
        expected = model(x, text, keys)
        apply_context_parallel(model, mesh, PLAN)
        for each in [model] if compiled == "model" else model.blocks if compiled == "blocks" else []:
            each.compile(fullgraph=True, backend=backend)
        errors, messages = [], []
        for _ in range(2):
            try:
                errors.append((model(x, text, keys) - expected).abs().max().item())
            except AttentionProviderError as error:
                messages.append(str(error))
    torch._dynamo.reset()
    return messages or max(errors)


def on_cpus(meshes, ring, ulysses, **arguments):
    torch.manual_seed(0)
    return attended(meshes(ring, ulysses), **arguments)


def gradients(meshes):
    """The error of a weight's gradient, averaged over the ranks, behind compiled blocks."""
    torch.manual_seed(0)
    model, mesh = Model().double(), meshes(2, 1)
    x, text = (torch.randn(1, length, WIDTH, dtype=torch.float64) for length in (24, 5))
    text.requires_grad_()
    (expected,) = torch.autograd.grad(model(x, text, "the text").square().sum(), text)
    apply_context_parallel(model, mesh, PLAN)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(model(x, text, "the text").square().sum(), text)
    torch._dynamo.reset()
    found = gather(found[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    return (found - expected).abs().max().item()


def test_keys_that_all_ranks_have(pool):
    assert max(pool.run(2, on_cpus, keys="the text", compiled=None, ring=2, ulysses=1)) < 1e-12


@pytest.mark.slow
def test_keys_that_all_ranks_have_in_compiled_blocks(pool):
    assert max(pool.run(2, on_cpus, keys="the text", compiled="blocks", ring=2, ulysses=1)) < 1e-12
    assert max(pool.run(2, gradients)) < 1e-12


CASES = [
    *[(keys, None) for keys in KEYS],
    *[pytest.param(*case, marks=pytest.mark.slow) for case in ((KEYS[0], "model"), (KEYS[3], "blocks"))],
]


@pytest.mark.parametrize("keys, compiled", CASES)
def test_keys_that_a_rank_makes_of_its_own_tokens(pool, keys, compiled):
    """Also in the second forward, of a caller that goes on after the first."""
    for messages in pool.run(2, on_cpus, keys=keys, compiled=compiled, ring=1, ulysses=2):
        assert_refused(messages)


def assert_refused(messages):
    assert isinstance(messages, list) and len(messages) == 2, messages
    for message in messages:
        assert "ranks 0 and 1 have different ones" in message and "CPAttention((), key=())" in message


def comparisons(meshes):
    """The number of comparisons in each of three forwards, the last one with a longer text."""
    model = Model()
    apply_context_parallel(model, meshes(2, 1), PLAN)
    counts, compare = [], local_keys._compare
    local_keys._compare = lambda *args: counts.append(len(sizes)) or compare(*args)
    sizes = []
    try:
        for length in (5, 5, 7):
            sizes.append(length)
            model(torch.randn(1, 24, WIDTH), torch.ones(1, length, WIDTH), "the text")
    finally:
        local_keys._compare = compare
    return counts


def test_only_the_first_forward_compares(pool):
    assert pool.run(2, comparisons) == [[1, 1, 3, 3]] * 2


def test_rounding_is_no_difference():
    one = torch.randn(1000, dtype=torch.float64)
    assert local_keys._equal(one.tolist(), (one * 1.001).tolist())
    assert not local_keys._equal(one.tolist(), one.roll(1).tolist())
    assert local_keys._equal(one.log().tolist(), one.log().tolist())  # with NaN
