"""In a forward whose tokens are split, attention takes part wherever it is called from, is local because the plan says
so, or is an error that names the module."""

import contextlib
import copy
import functools

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa_by_name
from torch.utils.checkpoint import checkpoint

from diffusers_attn import (
    AttentionProviderError,
    CPAttention,
    CPInput,
    CPOutput,
    DispatchProcessor,
    ParamId,
    attention_dispatch,
    attention_provider,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import _applied, apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.active import active
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from tests.zoo import CASES

from ..models import MESHES, attention_over_ranks

WIDTH, HEADS = 16, 4
PLAN = {"blocks.0": {ParamId("x"): CPInput(1, 3)}, "proj_out": CPOutput(1, 3)}
# The second of three ranks: what is refused is so before anything is sent, so that it needs no processes.
MESH = ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE)


def attend_in_a_helper(query, key, value):
    return attention_dispatch(query, key, value)


class Block(nn.Module):
    def __init__(self, attention=attention_dispatch):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x):
        query, key, value = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in self.to_qkv(x).chunk(3, dim=-1))
        return x + self.to_out(self.attention(query, key, value).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Its attention has no `.processor`. `run` runs a block: as it is, or within a checkpoint."""

    def __init__(self, *blocks, run=None):
        super().__init__()
        self.blocks, self.proj_out = nn.ModuleList(blocks), nn.Linear(WIDTH, WIDTH)
        self.run = run or (lambda block, x: block(x))

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return self.proj_out(x)


def forward_within_a_checkpoint(block, x):
    """A checkpoint of a function, in which no module with a hook begins."""
    return checkpoint(block.forward, x, use_reentrant=False) if block.to_qkv.weight[0, 0] > 9 else block(x)


RUNS = {
    "as it is": None,
    "checkpointed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "checkpointed, reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "a function checkpointed": forward_within_a_checkpoint,
}


def sdpa_3d(query, key, value):
    """As attention of a single head may be written: `[batch * heads, seq, head_dim]`."""
    out = torch.nn.functional.scaled_dot_product_attention(*(each.flatten(0, 1) for each in (query, key, value)))
    return out.unflatten(0, query.shape[:2])


def trained(model, *inputs):
    """Outputs, and gradients of all parameters, after all forwards: the last one's lengths are not the first one's."""
    model.zero_grad()
    outputs = [model(x) for x in inputs]
    sum(out.square().mean() for out in outputs).backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat([out.detach().flatten() for out in outputs]), torch.cat(grads)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def without_processors(meshes, ring, ulysses, rotate_method):
    """Errors of outputs and of the mean of gradients, for each way to run blocks."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    blocks = [Block(), Block(attend_in_a_helper), Block(sdpa_3d)]
    model = Model(*blocks).double()
    with torch.no_grad():
        blocks[1].to_qkv.weight[0, 0] = 10
    inputs = [torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True) for length in (11, 7)]
    expected, expected_grad = trained(model, *inputs)
    apply_context_parallel(model, mesh, PLAN)
    errors = {}
    for name, run in RUNS.items():
        model.run = run or (lambda block, x: block(x))
        with attention_provider("native", mesh=mesh), attention_over_ranks():
            found, grad = trained(model, *inputs)
        assert active.tracker is None
        grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
        errors[name] = error(found, expected), error(grad, expected_grad)
    return errors


@pytest.mark.parametrize("mesh", ["ulysses 2", "gather 2", "ring 3", "ring 2 x ulysses 2"])
def test_attention_without_a_processor(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    for errors in pool.run(ring * ulysses, without_processors, ring=ring, ulysses=ulysses, rotate_method=method):
        assert not {name: each for name, each in errors.items() if not max(each) < 1e-12}


class Nested(nn.Module):
    """Between its blocks it runs another model, to which a plan of its own is applied, and one of which nothing is
    split; and itself, with half of the tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.proj_out = Block(), Block(), nn.Linear(WIDTH, WIDTH)
        self.others = [Model(Block()).double(), Model(Block()).double()]

    def forward(self, x, prompt=None):
        x = self.first(x)
        if prompt is not None:
            extra = self.others[0](prompt).mean() + self(prompt[:, ::2]).mean()
            x = x + extra
        return self.proj_out(self.second(x))


def nested(meshes):
    mesh = meshes(2, 1)
    model = Nested().double()
    x, prompt = (torch.randn(1, length, WIDTH, dtype=torch.float64) for length in (9, 14))
    expected = model(x, prompt)
    plan = {"first": {ParamId("x"): CPInput(1)}, "proj_out": CPOutput(1)}
    apply_context_parallel(model, mesh, plan)
    apply_context_parallel(model.others[0], mesh, PLAN)
    found = model(x, prompt)
    unsplit = model.others[1]
    assert torch.equal(unsplit(prompt), unsplit(prompt)) and active.tracker is None
    return error(found, expected)


def test_a_forward_within_a_forward(pool):
    assert max(pool.run(2, nested)) < 1e-12


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_forward_that_is_left_by_an_error_is_over(kind):
    def leave(query, key, value):
        raise kind

    model = Model(Block(leave))
    apply_context_parallel(model, MESH, PLAN)
    for _ in range(2):
        with pytest.raises(kind):
            model(torch.randn(1, 9, WIDTH))
        tensors = torch.randn(3, 1, HEADS, 7, 8)
        assert torch.equal(attention_dispatch(*tensors), sdpa_by_name(*tensors))  # of other tokens: an error otherwise
        assert active.tracker is None


def test_lengths_that_fit_nothing_name_the_module():
    model = Model(Block(lambda *tensors: attention_dispatch(*(each[:, :, 1:] for each in tensors))))
    apply_context_parallel(model, MESH, PLAN)
    with pytest.raises(AttentionProviderError, match=r"2 queries and 2 keys on rank 1.*by 'blocks.0' \(Block\)"):
        model(torch.randn(1, 9, WIDTH))


# Attention that does not come through this library, by the module that has it.


def spelled_out(query, key, value):
    return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value


class Core:
    def __call__(self, query, key, value):
        return sdpa_by_name(query, key, value)


class OfTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


ELSEWHERE = {
    "by name": lambda: Block(sdpa_by_name),
    "spelled out": lambda: Block(spelled_out),
    "an object": lambda: Block(Core()),
    "a partial": lambda: Block(functools.partial(sdpa_by_name, scale=0.5)),
    "of torch": OfTorch,
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_that_goes_elsewhere_is_named(case, compiled):
    model = Model(ELSEWHERE[case](), Block()).eval()
    name = r"'blocks\.0\.attn'" if case == "of torch" else r"'blocks\.0'"
    apply_context_parallel(model, MESH, PLAN)
    if compiled:
        model.blocks[0].compile(fullgraph=case != "of torch", backend="eager")
    with pytest.raises(AttentionProviderError, match=name):
        model(torch.randn(1, 9, WIDTH))
    assert active.tracker is None
    remove_context_parallel(model)
    x = torch.randn(1, 9, WIDTH)
    assert torch.equal(model(x), model(x))
    # What the message says of the plan is so.
    split, local = PLAN["blocks.0"], CPAttention((), key=())
    plan = {"blocks.0": split, "blocks.0.attn": local} if case == "of torch" else {"blocks.0": [split, local]}
    model = Model(model.blocks[0]).eval()
    apply_context_parallel(model, MESH, plan)
    assert model(x).shape == (1, 3, WIDTH)


class Weighing(Block):
    """Scores without a product of matrices: nothing that is known to be attention, while it runs."""

    def forward(self, x):
        return x + (x[:, :, None] * x[:, None]).sum(dim=-1).softmax(dim=-1).unsqueeze(-1).mul(x[:, None]).sum(dim=2)


def test_a_forward_without_any_attention_is_looked_at():
    model = Model(Weighing(None))
    apply_context_parallel(model, MESH, {"blocks.0": PLAN["blocks.0"]})
    with pytest.raises(AttentionProviderError, match=r"no attention call came to.*'blocks.0' \(Weighing\)"):
        model(torch.randn(1, 9, WIDTH))
    model = Model(Weighing(None))
    apply_context_parallel(model, MESH, {"blocks.0": [PLAN["blocks.0"], CPAttention((), key=())]})
    assert model(torch.randn(1, 9, WIDTH)).shape == (1, 3, WIDTH)
    model = Model(nn.Linear(WIDTH, WIDTH))  # nothing in it looks at other tokens
    apply_context_parallel(model, MESH, {"blocks.0": {ParamId(index=0): CPInput(1, 3)}})
    assert model(torch.randn(1, 9, WIDTH)).shape == (1, 3, WIDTH)


# Processors that are exchanged in a model that is split.


class Own:
    """A user's processor, for Flux and for `Attention` of diffusers."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = attn.to_out[0](sdpa_by_name(query, key, value).transpose(1, 2).flatten(2))
        return out if encoder_hidden_states is None else (out, encoder_hidden_states)


def assign(model):
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor = Own()


def set_each(model):
    for module in model.modules():
        if hasattr(module, "processor"):
            module.set_processor(Own())


EXCHANGES = {
    "model.set_attn_processor": lambda model: model.set_attn_processor(Own()),
    "attn.set_processor": set_each,
    "assigned": assign,
}
DIFFUSERS = {"a new one of its own": lambda model: model.set_attn_processor(FluxAttnProcessor())}
"""which is a processor that could be bound, and is not."""


def flux():

    case = CASES["flux"]
    return case.build(), case.inputs()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_processor_that_was_exchanged_is_named(exchange, compiled):
    model, inputs = flux()
    apply_context_parallel(model, MESH)
    EXCHANGES[exchange](model)
    if compiled:
        model.transformer_blocks[0].compile(fullgraph=True, backend="eager")
    with (
        attention_provider("native", mesh=MESH),
        torch.no_grad(),
        pytest.raises(AttentionProviderError, match=r"'transformer_blocks\.0\.attn' \(FluxAttention\).*Own"),
    ):
        model(**inputs)


def exchanged(meshes):
    """For each way: what the forward before and after says, and whether all is as it was once it is disabled."""
    model, inputs = flux()
    before = dict(model.attn_processors)
    with torch.no_grad():
        expected = model(**inputs).sample
    answers = {}
    for name, exchange in {**EXCHANGES, **DIFFUSERS}.items():
        enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
        with torch.no_grad():
            wrong = error(model(**inputs).sample, expected)
            exchange(model)
            with pytest.raises(AttentionProviderError) as caught:
                model(**inputs)
        disable_context_parallel(model)
        same = all(model.attn_processors[name] is each for name, each in before.items())
        answers[name] = wrong, str(caught.value), same
    enable_context_parallel(model, mesh=meshes.lines[2], verbose=False)
    with pytest.raises(AttentionProviderError) as caught:
        set_attention_provider(model, None)
    with torch.no_grad():
        wrong = error(model(**inputs).sample, expected)
        model.set_attn_processor(Own())
        with contextlib.suppress(AttentionProviderError):
            model(**inputs)
        model.set_attn_processor(before)
        model.set_attn_processor(DispatchProcessor())  # the remedy
        wrong = max(wrong, error(model(**inputs).sample, expected))
    disable_context_parallel(model)
    same = all(model.attn_processors[name] is each for name, each in before.items())
    answers["unbound"] = wrong, str(caught.value), same
    return answers


def test_processors_exchanged_after_it_was_enabled(pool):
    for answers in pool.run(2, exchanged):
        for name, (wrong, message, same) in answers.items():
            assert wrong < 1e-5 and same, name
            expected = "disable_context_parallel first" if name == "unbound" else "'transformer_blocks.0.attn'"
            assert expected in message


# A forward that is called without the hooks of the model.


def of_the_model_itself():
    """Its plan has no hook on a module within it."""
    return Model(nn.Linear(WIDTH, WIDTH)), {"": [{ParamId("x"): CPInput(1, 3)}, CPOutput(1, 3)]}


OUTSIDE = {
    "split within": lambda: (Model(Block()), PLAN),
    "split before": lambda: (Model(Block()), {"": [{ParamId("x"): CPInput(1, 3)}, CPOutput(1, 3)]}),
    "nothing within": of_the_model_itself,
}


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_forward_without_the_hooks_of_its_model_is_refused(case, compiled, after):
    model, plan = OUTSIDE[case]()
    x, before = torch.randn(1, 9, WIDTH), model.state_dict().keys()
    expected = model(x)
    apply_context_parallel(model, MESH, plan)
    if after:  # what an earlier call knows of lengths must not serve

        def fail(*_):
            raise ValueError

        with model.blocks[0].register_forward_pre_hook(fail), pytest.raises(ValueError):
            model(x)
    called = torch.compile(model.forward, backend="eager", fullgraph=True) if compiled else model.forward
    for _ in range(2):
        with pytest.raises(AttentionProviderError, match="a Model is split between ranks, and 'blocks.0.*call model"):
            called(x)
        assert active.tracker is None
    # What the message says is so.
    remove_context_parallel(model)
    assert model.state_dict().keys() == before and torch.equal(model.forward(x), expected)


def test_a_part_of_a_model_outside_of_its_call_is_refused():
    model, inputs = flux()
    apply_context_parallel(model, MESH)
    for wrapper in (lambda **given: model.forward(**given), functools.partial(type(model).forward, model)):
        with pytest.raises(AttentionProviderError, match="a FluxTransformer2DModel is split between ranks"):
            wrapper(**inputs)
    remove_context_parallel(model)
    assert model.forward(**inputs).sample.isfinite().all()


def with_a_new_block(model):
    model.transformer_blocks[0] = copy.deepcopy(model.transformer_blocks[0])


def with_one_more_block(model):
    model.single_transformer_blocks.append(copy.deepcopy(model.single_transformer_blocks[0]))


def with_new_attention(model):
    model.single_transformer_blocks[0].attn = copy.deepcopy(model.single_transformer_blocks[0].attn)


@pytest.mark.parametrize("change", [with_a_new_block, with_one_more_block, with_new_attention])
def test_attention_that_came_later_is_named(change):
    model = CASES["flux"].build()
    apply_context_parallel(model, MESH)
    change(model)
    for _ in range(2):
        with pytest.raises(
            AttentionProviderError, match=r"'\w+blocks\.\d\.attn' \(FluxAttention\) was added to this Flux"
        ):
            model(**CASES["flux"].inputs())
    remove_context_parallel(model)
    apply_context_parallel(model, MESH)  # now the plan knows of it
    _applied[model].attention.check(model)


def test_known_attention_may_be_moved():
    model = CASES["flux"].build()
    apply_context_parallel(model, MESH)
    model.transformer_blocks = torch.nn.ModuleList(list(model.transformer_blocks)[::-1])
    model.single_transformer_blocks[0].attn = torch.compile(model.single_transformer_blocks[0].attn)
    _applied[model].attention.check(model)
    del model.single_transformer_blocks[-1]
    _applied[model].attention.check(model)
