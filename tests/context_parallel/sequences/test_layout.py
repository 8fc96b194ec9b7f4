"""What is computed from the lengths of a forward is computed once, and again when a length changes."""

from diffusers_attn.context_parallel.sequences.placeholders import LocalTokens
from diffusers_attn.context_parallel.sequences.roles import Role

from ..hooks.test_plan_words import tracker_of

NAMES = ("text", "image")


def tracker_with(text, image):
    tracker = tracker_of(2)
    tracker.named.update(NAMES)
    tracker.begin_forward()
    tracker.shard_length("text", text)
    tracker.shard_length("image", image)
    return tracker


def test_layers_share_what_the_first_has_computed(monkeypatch):
    tracker = tracker_with(2, 8)
    tracker.role = Role(NAMES, NAMES)
    first = tracker.shards(NAMES), tracker.kept(NAMES), tracker.attention(3, 3)
    monkeypatch.setattr(tracker, "_make_shards", None)
    monkeypatch.setattr(tracker, "_make_local_tokens", None)
    monkeypatch.setattr(tracker, "_attention", None)
    assert first[1] == LocalTokens(3, ((1, 2),))
    recomputing = tracker.shards(NAMES), tracker.kept(NAMES), tracker.attention(3, 3)
    assert all(one is other for one, other in zip(first, recomputing, strict=True))
    tracker.end_forward()


def test_another_length_or_forward_has_others():
    tracker = tracker_with(2, 8)
    state, sizes = tracker.state(), tracker.shards(NAMES).sizes
    assert sizes == (4, 4, 2) and tracker.kept(NAMES) is not None
    tracker.shard_length("image", 9)  # a split in the middle of the forward
    assert tracker.shards(NAMES).sizes == (4, 4, 3)
    tracker.begin_forward()  # a forward within that forward
    tracker.shard_length("text", 3)
    tracker.shard_length("image", 3)
    assert tracker.shards(NAMES).sizes == (2, 2, 2) and tracker.kept(NAMES) is None
    tracker.end_forward()
    assert tracker.shards(NAMES).sizes == (4, 4, 3) and tracker.kept(NAMES) == LocalTokens(4, ((1, 3),))
    with tracker.recomputing(state, None):
        assert tracker.shards(NAMES).sizes == sizes
    assert tracker.shards(NAMES).sizes == (4, 4, 3)
    tracker.restore(state)  # of a recorded forward
    assert tracker.shards(NAMES).sizes == sizes
    tracker.end_forward()
