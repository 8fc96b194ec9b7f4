"""Modules that compute by heads, or look at neighbours, over a sequence that is split: words of plans, and SANA-WM,
which is made of both."""

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError, CPInput, CPOutput, ParamId
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.hooks.words.halo import with_halo
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker
from diffusers_attn.cp_plans import advanced
from diffusers_attn.cp_plans.registry import get_cp_plan
from diffusers_attn.parallelize.targets import Target, split_heads
from tests.zoo import CASES

from ..models import build, inputs
from .test_plan_words import mesh_of, tracker_of


class Recurrence(nn.Module):
    """A state of every head, which passes from frame to frame; what is added to it is the same for all heads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, values, *, gates, frames, added=None):
        """`[batch, frames * pixels, heads, channels]`, and `[batch, heads, frames]` of gates."""
        self.seen.append(values.shape[2])
        state, states = 0.0, []
        for index, frame in enumerate(values.unflatten(1, (frames, -1)).unbind(1)):
            gate = gates[..., index].sigmoid()
            state = state * gate[..., None] + frame.mean(dim=1) + (0 if added is None else added[:, index, None, None])
            states.append(frame * state[:, None])
        return torch.cat(states, dim=1).flatten(2)


class Model(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.first, self.gates = nn.Linear(4, 3 * heads).double(), nn.Linear(4, heads).double()
        self.last, self.recurrence = nn.Linear(3 * heads, 4).double(), Recurrence()

    def forward(self, x, frames, added=None):
        values = self.first(x).unflatten(-1, (self.heads, -1))
        gates = self.gates(x).unflatten(1, (frames, -1)).mean(dim=2).transpose(1, 2)
        return self.last(self.recurrence(values, gates=gates, frames=frames, added=added))


def plan_of(heads):
    frames = CPInput(1, 3, sequence="frames", grouped=True)
    return {
        "": {ParamId("frames"): advanced.CPLength("frames"), "x": frames, "added": CPInput(1, 2, sequence="frames")},
        "recurrence": [
            {
                "frames": advanced.CPLength("frames", full=True),
                "added": advanced.CPGatherInput(1, 2, sequence="frames"),
            },
            advanced.CPHeads("frames", heads, {"values": (1, 2), "gates": (-1, 1)}, output=(1, 2)),
        ],
        "last": CPOutput(1, 3, sequence="frames", grouped=True),
    }


def compared(meshes, ring, ulysses, heads, frames, compiled=False):
    mesh = meshes(ring, ulysses)
    torch.manual_seed(1)
    model = Model(heads)
    given = {"x": torch.randn(2, frames * 3, 4).double(), "frames": frames, "added": torch.randn(2, frames).double()}
    results = []
    for split in (False, True):
        if split:
            apply_context_parallel(model, mesh, plan_of(heads))
        if split and compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        out = model(**given)
        grads = torch.autograd.grad(out.square().mean(), list(model.parameters()))
        results.append((out.detach(), torch.cat([each.flatten() for each in grads])))
    (expected, expected_grad), (found, grad) = results
    grad = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
    return (found - expected).abs().max().item(), (grad - expected_grad).abs().max().item(), model.recurrence.seen


@pytest.mark.parametrize(
    ("ring", "ulysses", "heads", "seen"),
    [(1, 3, 5, [2, 2, 1]), (4, 1, 2, [1, 1, 1, 1]), (2, 2, 7, [2, 2, 2, 1])],  # the second: two compute one of zeros
)
def test_every_rank_computes_some_heads(pool, ring, ulysses, heads, seen):
    answers = pool.run(ring * ulysses, compared, ring=ring, ulysses=ulysses, heads=heads, frames=5)
    for rank, (out, grad, (alone, own)) in enumerate(answers):
        assert out < 1e-12 and grad < 1e-12
        assert alone == heads and own == seen[rank]


@pytest.mark.slow
def test_in_a_compiled_graph(pool):
    for out, grad, seen in pool.run(3, compared, ring=3, ulysses=1, heads=2, frames=4, compiled=True):
        assert out < 1e-12 and grad < 1e-12 and seen == [2, 1]


def beside(meshes, ring, ulysses, lengths):
    """Errors of what a rank sees of its neighbours and of gradients, and how many entries it saw."""
    mesh, answers = meshes(ring, ulysses), []
    for length, reach, grouped in lengths:
        tracker, spec = SequenceTracker(mesh), advanced.CPHalo(1, reach, "frames", grouped)
        tracker.shard_length("frames", length)
        full = torch.randn(2, length * (3 if grouped else 1), 2, generator=torch.Generator().manual_seed(0)).double()
        weights = torch.randn(full.shape, generator=torch.Generator().manual_seed(1)).double()
        own = (tracker.split_groups if grouped else tracker.split)("frames", full, 1).requires_grad_()
        shards = tracker.shards(("frames",))
        each, ((start, size),) = full.shape[1] // length, shards.spans[mesh.rank]
        seen = [(max(0, begin - reach), min(length, begin + count + reach)) for ((begin, count),) in shards.spans]

        def part(tensor, first, last, each=each):
            return tensor[:, first * each : last * each]

        found = with_halo(tracker, spec, own)
        error = (found - part(full, *seen[mesh.rank])).abs().max()
        (found * part(weights, *seen[mesh.rank])).sum().backward()
        counts = sum(torch.tensor([float(first <= index < last) for index in range(length)]) for first, last in seen)
        expected = part(weights * counts.repeat_interleave(each)[:, None], start, start + size)
        answers.append((error.item(), (own.grad - expected).abs().max().item()))
    return answers


@pytest.mark.parametrize(("ring", "ulysses"), [(3, 1), (1, 4), (2, 2)])
def test_what_a_rank_sees_of_its_neighbours(pool, ring, ulysses):
    # Edges that are less than all; beyond a neighbour; all there is.
    lengths = [(*each, grouped) for each in ((30, 2), (5, 3), (6, 9)) for grouped in (False, True)]
    for answers in pool.run(ring * ulysses, beside, ring=ring, ulysses=ulysses, lengths=lengths):
        assert max(map(max, answers)) < 1e-12, dict(zip(lengths, answers))


def test_what_is_not_split_has_no_neighbours():
    tracker = tracker_of(1)
    tracker.shard_length("rows", 5)  # 2, 2, 1
    for grouped, size in ((False, 5), (True, 7)):
        expected = f"Expected {'a multiple of ' if grouped else ''}2 entries of 'rows' .* shape .*1, {size}.*Split it"
        with pytest.raises(AttentionProviderError, match=expected):
            with_halo(tracker, advanced.CPHalo(1, 1, "rows", grouped), torch.zeros(1, size))


GIVEN = {"values": torch.zeros(1, 6, 4, 2), "gates": torch.zeros(1, 4, 2), "frames": 2}  # two of five frames


@pytest.mark.parametrize(
    ("length", "changes", "reason"),
    [
        (None, {}, "which has a length of 0, and every one of 3 ranks needs one"),
        (2, {}, "which has a length of 2, and every one of 3 ranks needs one"),
        (5, {"values": torch.zeros(1, 7, 4, 2)}, r"'values' of '' is a tensor \[1, 7, 4, 2\], .* a sequence of 2 in"),
        (5, {"gates": torch.zeros(1, 3, 2)}, r"'gates' of '' is a tensor \[1, 3, 2\], .* and 4 heads in dimension 1"),
        (5, {"gates": None}, "'gates' of '' is a NoneType"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(length, changes, reason):
    module = Recurrence()
    tracker = apply_context_parallel(module, mesh_of(1), {"": plan_of(4)["recurrence"][1]})
    tracker.clear = lambda: length is None or tracker.shard_length("frames", length)
    with pytest.raises(AttentionProviderError, match=reason):
        module(**GIVEN | changes)


def test_a_length_is_made_whole_again():
    module = Recurrence()
    module.forward = lambda values, frames: frames
    tracker = apply_context_parallel(module, mesh_of(1), {"": {"frames": advanced.CPLength("frames", full=True)}})
    tracker.clear = lambda: tracker.shard_length("frames", 5)
    assert module(None, 2) == 5
    with pytest.raises(AttentionProviderError, match="Expected local length 2 of 'frames', got 5; .* frames: 5"):
        module(None, 5)
    with pytest.raises(ValueError, match="set one of them"):
        advanced.CPLength("frames", of=len, full=True)


def test_words_name_arguments_that_there_are():
    for spec in (
        advanced.CPHeads("frames", 4, {"query": (1, 2)}, (1, 2)),
        advanced.CPHalo(1, 1, "frames", length="count"),
    ):
        with pytest.raises(AttentionProviderError, match="'(query|count)' of '', and the forward of Recurrence has"):
            apply_context_parallel(Recurrence(), mesh_of(1), {"": spec})


def test_heads_of_a_recurrence_count_in_the_choice_of_degrees():
    model = CASES["sana_wm"].build()
    assert split_heads(Target("model", model, get_cp_plan(model))) == (4,)
    assert split_heads(Target("model", model, {})) == (
        4,
    )  # its cross-attention, of which no plan says that it is local


@pytest.mark.parametrize("form", [(slice(None),), (slice(None), None), (slice(None), None, slice(None), None, None)])
def test_frames_that_are_left_out_are_split_in_every_form(form):
    name = "sana_wm, camera"
    model, given = build(name), inputs(name)
    seen = []
    given["frame_valid_mask"] = mask = given["frame_valid_mask"][form]
    tracker = apply_context_parallel(model, mesh_of(1), None)
    model.blocks[1].forward = lambda *args: seen.append((args[2], args[4], args[10])) or args[0]
    tracker.begin_forward()
    tracker.shard_length("frames", 5)
    times = torch.zeros(2, 1, 5, 6 * 64)
    model.blocks[1](torch.zeros(2, 70, 64), None, times, None, (5, 5, 7), *[None] * 5, mask)
    tracker.end_forward()
    ((t, thw, found),) = seen
    assert t.shape[2] == 2 and thw == (2, 5, 7)
    assert found.ndim == mask.ndim and torch.equal(found.flatten(1), mask.flatten(1)[:, 2:4])
