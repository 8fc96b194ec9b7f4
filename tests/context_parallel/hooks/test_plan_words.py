"""What plans can say beyond splitting one sequence: several joined, their lengths, rows of a mask, tokens that stand
in, and what is refused before a forward begins."""

import fnmatch

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError
from diffusers_attn.call import AttentionCall
from diffusers_attn.context_parallel.attention import entry as call_module
from diffusers_attn.context_parallel.attention.entry import split_attention
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.hooks.plan_words import ARGUMENTS, ENTRIES
from diffusers_attn.context_parallel.hooks.words import attention
from diffusers_attn.context_parallel.hooks.words.halo import AddHalo
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.placeholders import LocalTokens
from diffusers_attn.context_parallel.sequences.roles import Role
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker
from diffusers_attn.cp_plans import advanced, registry
from diffusers_attn.cp_plans import plan as plan_module
from diffusers_attn.cp_plans.plan import CPAttention, CPInput, ParamId
from diffusers_attn.cp_plans.registry import get_cp_plan, list_cp_plans
from tests.zoo import CASES


def tracker_of(rank, ranks=3):
    """Of one of several ranks. Splitting needs no other, so that these tests need no processes."""
    return SequenceTracker(mesh_of(rank, ranks))


def mesh_of(rank, ranks=3):
    return ContextParallelMesh(ContextParallelConfig(ranks), Group("none", rank, ranks), ALONE)


def test_every_plan_word_has_a_hook():
    words = [each for module in (plan_module, advanced) for name, each in vars(module).items() if name[:2] == "CP"]
    assert set(words) == {*ARGUMENTS, *ENTRIES} - {type(None)}


class Recorder(nn.Module):
    def forward(self, hidden_states=None, length=None, mode=None):
        return hidden_states, length, mode


def test_joined_sequences_are_split_each_on_its_own():
    tracker = tracker_of(1)
    assert tracker.shard_length("video", 7) == 2
    tokens = torch.arange(11)[None]  # 4 of the history, 7 of the video
    assert tracker.split(("history", "video"), tokens, 1).tolist() == [[2, 7, 8]]
    assert tracker.lengths == {"video": 7, "history": 4}
    assert tracker.split(("history", "video"), tokens[:, 4:], -1).tolist() == [[7, 8]]  # this time without a history
    with pytest.raises(AttentionProviderError, match=r"history and video, joined .* longer: .*video: 7"):
        tracker.split(("history", "video"), tokens[:, :6], 1)
    # The text was not split before.
    assert tracker.split(("video", "text"), tokens, 1).tolist() == [[3, 4, 9]]
    with pytest.raises(AttentionProviderError, match="'audio' has been split"):
        tracker.split(("history", "image", "audio"), tokens, 1)


def test_a_module_is_given_the_length_of_its_shard():
    module = Recorder()
    plan = {
        "": {ParamId("length"): advanced.CPLength("video"), "hidden_states": CPInput(1, sequence=("history", "video"))}
    }
    apply_context_parallel(module, mesh_of(2), plan)
    hidden_states, length, _ = module(torch.arange(11)[None], length=7)
    assert hidden_states.tolist() == [[3, 9, 10]] and length == 2
    with pytest.raises(AttentionProviderError, match=r"length of .. is a tensor.*CPLength.*which accepts an int"):
        module(length=torch.tensor(7))


def test_one_value_for_all_tokens_is_left():
    module = Recorder()
    plan = {"": {"hidden_states": CPInput(1, 2, sequence="video", leave_other_dims=True)}}
    tracker = apply_context_parallel(module, mesh_of(2), plan)
    for shape in ((2,), (2, 1), (2, 3, 4)):
        assert module(torch.zeros(shape))[0].shape == shape
    assert not tracker.lengths
    assert module(torch.zeros(2, 7))[0].shape == (2, 2)


def test_of_joined_sequences_some_may_be_split_already():
    tokens = torch.arange(10)[None]
    for rank, seen in enumerate(([[0, 1, 5, 6]], [[2, 3, 5, 6]], [[4, 5, 6]])):
        tracker = tracker_of(rank)
        tracker.named.add("text")
        tracker.shard_length("text", 2)
        tracker.shard_length("image", 5)
        mixed = tokens[:, :7]  # 5 of the image, replicated, and one for each of two texts on every rank
        assert tracker.split(("image", "text", "text"), mixed, 1, already=("text",)).tolist() == seen
        tracker.lengths.pop("image")
        assert tracker.split(("text", "image"), tokens[:, :6], 1, already=("text",)).shape == (1, len(seen[0]) - 1)
        assert tracker.lengths["image"] == 5


def test_sequences_that_a_forward_does_not_have():
    tracker = tracker_of(2)
    tracker.role = Role(("text", "image", "reference"), ("text", "image", "reference"))
    tracker.split("text", torch.zeros(3), 0)
    tracker.split("image", torch.zeros(7), 0)
    call = tracker.attention(3, 3)
    assert call.queries == call.keys == tracker.shards(("text", "image")) and call.in_order
    query = torch.zeros(1, 4, 2, 4)
    with pytest.raises(AttentionProviderError, match="a mix of"):
        split_attention(AttentionCall(query, query, query, provider="native"), tracker)


def test_a_sequence_that_is_one_dimension_with_the_batch():
    tracker = tracker_of(1)
    tokens = torch.arange(14)[:, None]  # two samples of 7
    with pytest.raises(AttentionProviderError, match="'video' has been split before"):
        tracker.split("video", tokens, 0, flattened=True)
    tracker.split("video", tokens[:7], 0)
    assert tracker.split("video", tokens, 0, flattened=True).tolist() == [[3], [4], [10], [11]]
    assert tracker.split("video", tokens.T, -1, flattened=True).tolist() == [[3, 4, 10, 11]]
    with pytest.raises(
        AttentionProviderError, match="'video' once for every sample in dimension 0.*Split .* are video: 7"
    ):
        tracker.split("video", tokens[:13], 0, flattened=True)


def test_rows_of_pixels_are_split_and_every_rank_needs_one():
    tracker = tracker_of(1)
    pixels = torch.arange(10)[None]  # five rows of two
    with pytest.raises(AttentionProviderError, match="'rows' has been split"):
        tracker.split_groups("rows", pixels, 1)
    tracker.shard_length("rows", 5)  # 2, 2, 1
    assert tracker.split_groups("rows", pixels, -1).tolist() == [[4, 5, 6, 7]]
    with pytest.raises(AttentionProviderError, match="no tensor of sequence 'columns' has been split"):
        tracker.gather_groups("columns", pixels, 1)
    tracker.shard_length("rows", 3)  # one for every rank
    assert tracker.split_groups("rows", pixels[:, :6], 1).tolist() == [[2, 3]]
    for rows, tokens in ((2, 4), (5, 11)):
        tracker.shard_length("rows", rows)
        with pytest.raises(AttentionProviderError, match=f"every one of 3 ranks needs one; .* rows: {rows}"):
            tracker.split_groups("rows", torch.zeros(1, tokens), 1)


def test_neighbours_are_of_an_argument_by_position():
    with pytest.raises(AttentionProviderError, match="first argument of 'conv'.*by position"):
        AddHalo(tracker_of(1), "conv", advanced.CPHalo(2, 1, "rows"))(nn.Identity(), (), {})


def test_a_whole_mask_of_keys_is_cut_to_those_of_this_rank():
    tracker = tracker_of(2)
    tracker.split("text", torch.zeros(3), 0)
    tracker.split("video", torch.zeros(5), 0)
    tracker.role = Role(("text", "video"), ("text", "video"), key_mask=True)
    call = tracker.attention(2, 2)
    mask = torch.arange(8.0).expand(2, 4, 1, 8)
    for replicated in (mask, torch.nn.functional.pad(mask, (0, 2)), mask.expand(2, 4, 2, 8)):
        found = call_module._mask(replicated, call, tracker, None, None)
        assert isinstance(found, KeyMask) and found.values.tolist() == [[2, 7]] * 2
    for shape in ((1, 1, 2, 8), (2, 1, 1, 7)):
        with pytest.raises(AttentionProviderError, match="one row, with columns for all 8 keys"):
            call_module._mask(torch.ones(shape), call, tracker, None, None)


def test_a_plan_may_depend_on_the_model(monkeypatch):
    monkeypatch.setattr(registry, "_plans", {})
    registry.register_cp_plan("Recorder", lambda model: {"": {"mode": advanced.CPForbidden(f"of {model.training}")}})
    assert get_cp_plan(Recorder().eval())[""]["mode"].reason == "of False"


def test_what_a_plan_cannot_serve_is_refused_first():
    module = Recorder()
    plan = {"": {"hidden_states": CPInput(1), "mode": advanced.CPForbidden("it caches. Leave it out.")}}
    apply_context_parallel(module, mesh_of(0), plan)
    assert module(torch.zeros(1, 6), mode=None)[0].shape == (1, 2)
    with pytest.raises(AttentionProviderError, match=r"mode='extract', which .* cannot serve: it caches. Leave it out"):
        module(torch.zeros(1, 6), mode="extract")


def test_flux2_is_refused_with_a_cache():
    case = CASES["flux2"]
    model = case.build()
    apply_context_parallel(model, mesh_of(0))
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    for mode in ("extract", "cached"):
        with pytest.raises(AttentionProviderError, match=f"kv_cache_mode='{mode}'.*reference images"):
            model(**case.inputs(), kv_cache_mode=mode, num_ref_tokens=3)


def test_rows_must_be_those_of_this_rank():
    tracker = tracker_of(1)
    tracker.split("video", torch.zeros(7), 0)  # 3, 2, 2
    tracker.role = Role(("video",), ("video",), row_mask=True)
    query = torch.zeros(1, 2, 4, 8)
    for shape in ((1, 1, 7, 7), (1, 4, 2, 6), (1, 1, 1, 7)):
        with pytest.raises(AttentionProviderError, match="this rank's 2 queries and columns for all 7 keys"):
            split_attention(AttentionCall(query, query, query, torch.ones(shape), provider="native"), tracker)


def test_a_rank_without_a_token_is_given_one():
    text = torch.arange(10, 12)[None]
    for rank, seen in enumerate(([[10]], [[11]], [[10]])):
        tracker = tracker_of(rank)
        tracker.named.add("text")
        assert tracker.split("text", text, 1).tolist() == seen
        assert tracker.shard_length("image", 5) == (2, 2, 1)[rank]
        assert tracker.kept(("text", "image")) == (LocalTokens(2, ((1, 1),)) if rank == 2 else None)
        with pytest.raises(AttentionProviderError, match=r"'text' has 2 tokens for 3 ranks.*CPAttention"):
            tracker.attention(2, 2)  # on all ranks alike
        tracker.role = Role(("text", "image"), ("text", "image"))
        assert tracker.attention((3, 3, 2)[rank], (3, 3, 2)[rank]).queries.sizes == (3, 3, 1)
        with pytest.raises(AttentionProviderError, match="CPOutput"):
            tracker.gather(None, text, 1)
    assert tracker.split(("text", "image"), torch.arange(7)[None], 1).tolist() == [[0, 6]]
    tracker.clear()
    assert tracker.split("text", text[:, :0], 1).shape == (1, 0)  # nothing can stand in
    with pytest.raises(ValueError, match="needs the name of its sequence"):
        CPInput(1, balanced=True)


@pytest.mark.parametrize("runs", [(), ((0, 2),), ((1, 2),), ((0, 1), (3, 2)), ((1, 1), (2, 3))])
def test_placeholders_come_back_as_zeros(runs):
    kept, tokens = LocalTokens(6, runs), torch.arange(1, 7)[None]
    own = [index for start, length in runs for index in range(start, start + length)]
    taken = kept.take_out(tokens, 1)
    assert taken.tolist() == [[index + 1 for index in own]]
    assert kept.put_back(taken, 1).tolist() == [[index + 1 if index in own else 0 for index in range(6)]]


def test_a_model_may_have_no_block_of_a_kind():
    model = nn.Module()
    model.blocks, model.norm = nn.ModuleList(), nn.Linear(2, 2)
    apply_context_parallel(model, mesh_of(0), {"blocks.*.attn": CPAttention(("x",))})
    with pytest.raises(AttentionProviderError, match="has no 'attn'"):
        other = nn.Module()
        other.blocks = nn.ModuleList([nn.Linear(2, 2)])
        apply_context_parallel(other, mesh_of(0), {"blocks.*.attn": CPAttention(("x",))})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model_class in list_cp_plans()])
def test_plans_say_what_every_attention_module_joins(name, monkeypatch):
    """Lengths would tell most of the time, and not where a text happens to be as long as a shard."""
    monkeypatch.setattr(attention, "_check_bound", lambda *_: None)
    case = CASES[name]
    model = case.build()
    tracker = apply_context_parallel(model, mesh_of(0))
    tracker.begin_forward()
    for path, module in model.named_modules():
        if hasattr(module, "processor") and not any(fnmatch.fnmatch(path, silent) for silent in case.silent):
            (enter,) = [
                each for each in module._forward_pre_hooks.values() if isinstance(each, attention.EnterAttention)
            ]
            tracker.role = None
            enter(module, ())
            assert tracker.role is not None, path
            tracker.end_attention()
    tracker.end_forward()


def test_every_plan_of_diffusers_has_one_here():
    from diffusers.models import transformers

    classes = {name: each for name, each in vars(transformers).items() if isinstance(each, type)}
    theirs = {name for name, each in classes.items() if getattr(each, "_cp_plan", None) is not None}
    assert len(theirs) >= 9 and theirs <= set(list_cp_plans())
