"""The global batches of a training, and how they are divided."""

import itertools
import json
from collections import Counter

import pytest

from diffusers_attn.training.data import BatchSampler, Share, TrainingDataError
from diffusers_attn.training.data.sampler import Position

BUCKETS = ["a"] * 7 + ["b"] * 4 + ["c"]


def steps(sampler, number, first=0):
    return [sampler.step(i) for i in range(first, first + number)]


def test_every_example_in_every_epoch_and_one_bucket_per_batch():
    sampler = BatchSampler(BUCKETS, global_batch_size=4, seed=1)
    assert (sampler.steps_per_epoch, sampler.filled) == (4, 4)
    for epoch in range(3):
        found = steps(sampler, 4, epoch * 4)
        assert {step.epoch for step in found} == {epoch}
        assert all(len(step.indices) == 4 and len({BUCKETS[i] for i in step.indices}) == 1 for step in found)
        counts = Counter(i for step in found for i in step.indices)
        assert counts.keys() == set(range(12))
        assert (counts[11], max(counts[i] for i in range(11))) == (4, 2)


def test_shuffled_by_seed_and_epoch():
    first, same, other = (BatchSampler(BUCKETS, global_batch_size=2, seed=seed) for seed in (1, 1, 2))
    uninterrupted = steps(first, 14)
    assert uninterrupted == steps(same, 14)
    assert uninterrupted != steps(other, 14)
    assert [step.indices for step in uninterrupted[:7]] != [step.indices for step in uninterrupted[7:]]
    assert list(reversed([same.step(i) for i in reversed(range(14))])) == uninterrupted  # in any order


def test_buckets_take_turns_in_another_order_in_each_epoch():
    sampler = BatchSampler(["a"] * 4 + ["b"] * 4, global_batch_size=1)
    orders = {tuple(step.indices[0] // 4 for step in steps(sampler, 8, epoch * 8)) for epoch in range(5)}
    assert len(orders) > 1 and all(sum(order) == 4 for order in orders)


def test_dropped_examples_come_in_other_epochs():
    sampler = BatchSampler(["a"] * 7, global_batch_size=4, incomplete="drop")
    assert (sampler.steps_per_epoch, sampler.filled) == (1, -3)
    assert {i for step in steps(sampler, 20) for i in step.indices} == set(range(7))
    with pytest.raises(TrainingDataError, match="never fill a batch.*\\n.*bucket c: 1 examples"):
        BatchSampler(BUCKETS, global_batch_size=4, incomplete="drop")


def test_repeats():
    sampler = BatchSampler(["a"] * 3, global_batch_size=2, repeats=[1, 3, 2])
    counts = Counter(i for step in steps(sampler, sampler.steps_per_epoch) for i in step.indices)
    assert counts == {0: 1, 1: 3, 2: 2}
    assert BatchSampler(["a"] * 3, global_batch_size=3, repeats=2).steps_per_epoch == 2


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2)])
def test_shares_are_disjoint_and_whole(size, micro):
    shares = [Share(rank, size, micro).positions(12) for rank in range(size)]
    assert {len(each) for each in shares} == {12 // size // micro}
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(12))


def test_batches_that_cannot_be_divided():
    with pytest.raises(
        TrainingDataError, match="global_batch_size=10 .* 4 data-parallel .*micro_batch_size=2.* 8 and 16"
    ):
        Share(0, 4, 2).accumulation_steps(10)
    with pytest.raises(TrainingDataError, match="ranks from 0"):
        Share(4, 4).accumulation_steps(8)


def test_position_goes_on_where_it_was():
    sampler = BatchSampler(BUCKETS, global_batch_size=2, seed=1)
    position = Position(sampler)
    position.next_step = 10
    state = json.loads(json.dumps(position.state_dict()))
    assert (state["epoch"], state["position"]) == (1, 3)
    resumed = Position(BatchSampler(BUCKETS, global_batch_size=2, seed=1))
    resumed.load_state_dict(state)
    assert resumed.next_step == 10
    for buckets, settings in [(BUCKETS[1:], {}), (BUCKETS, {"seed": 2}), (BUCKETS, {"global_batch_size": 4})]:
        other = BatchSampler(buckets, **{"global_batch_size": 2, "seed": 1, **settings})
        with pytest.raises(TrainingDataError, match="have changed since"):
            Position(other).load_state_dict(state)


@pytest.mark.parametrize(
    "settings, message",
    [({"global_batch_size": 0}, "global_batch_size=0"), ({"repeats": 0}, "repeats=0"),
     ({"incomplete": "pad"}, "incomplete='pad': accepted are 'fill', 'drop'")],
)  # fmt: skip
def test_senseless_settings(settings, message):
    with pytest.raises(TrainingDataError, match=message):
        BatchSampler(BUCKETS, **{"global_batch_size": 2, **settings})
    with pytest.raises(TrainingDataError, match="no examples"):
        BatchSampler([], global_batch_size=1)
