"""One process, two that share each sequence by a ring or by Ulysses, and two times two, train alike."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .runs import QUICK, train_all, train_sharded
from .worlds import World

FAMILIES = list(QUICK)
STEPS = 4
"""of a run; half of them before it is resumed."""
ONE = {"batch_size": 2}
SPLIT = {
    "ring": {"batch_size": 2, "cp_degree": 2, "ring_degree": 2, "rotate_method": "alltoall"},
    "ulysses": {"batch_size": 2, "ulysses_degree": 2},
    "dp x cp": {"batch_size": 1, "cp_degree": 2},
}
# What a family does with its inputs does not depend on how they are exchanged: a picture and a video show the others.
TRAINED = {"one": FAMILIES, "ring": FAMILIES, "ulysses": ["flux", "cogvideox"], "dp x cp": ["wan", "cogview4"]}
RESUMED = ["wan", "cogview4"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(run_worlds, settings_of):
    """The steps of families, on one process and on several: the same four examples in each step."""

    def job(size, name, several, **more):
        several = [settings_of(family, steps=STEPS, **several, **more) for family in TRAINED[name]]
        return World(size, train_all, {"several": several})

    alone = job(1, "one", ONE, checkpoint_every=STEPS // 2, checkpoints_kept=0)
    first = run_worlds(alone, job(2, "ring", SPLIT["ring"]))
    halfway = {
        family: f"{settings['output_dir']}/checkpoints/step-{STEPS // 2:08}"
        for family, settings in zip(FAMILIES, alone.arguments["several"])
    }
    resumed = [settings_of(family, steps=STEPS, **SPLIT["ring"], resume=halfway[family]) for family in RESUMED]
    second = run_worlds(job(2, "ulysses", SPLIT["ulysses"]), World(2, train_all, {"several": resumed}))
    third = run_worlds(job(4, "dp x cp", SPLIT["dp x cp"]))
    sharded = settings_of("cogview4", steps=STEPS, batch_size=1, resume=halfway["cogview4"])
    arguments = {"settings": sharded, "block": "CogView4TransformerBlock", "cp_degree": 2}
    [fourth] = run_worlds(World(4, train_sharded, arguments))
    # What Accelerate makes of a mixed precision with FSDP2 is not what it makes of it without.
    mixed = {"batch_size": 2, "mixed_precision": "bf16", "steps": 2}
    plain = settings_of("wan", **mixed, cp_degree=2)
    arguments = {"settings": settings_of("wan", **mixed), "block": "WanTransformerBlock", "cp_degree": 2}
    fifth = run_worlds(World(2, train_all, {"several": [plain]}), World(2, train_sharded, arguments))
    answers = dict(zip(["one", "ring", "ulysses", "resumed", "dp x cp"], [*first, *second, *third]))
    trained = {**TRAINED, "resumed": RESUMED}
    found = {name: [dict(zip(trained[name], of_rank)) for of_rank in ranks] for name, ranks in answers.items()}
    return {**found, "sharded": fourth, "mixed": fifth}


@pytest.mark.parametrize(("split", "family"), [(split, family) for split in SPLIT for family in TRAINED[split]])
def test_loss_and_gradient_norm_are_those_of_one_process(runs, family, split):
    expected = runs["one"][0][family]["steps"]
    assert len(expected) == STEPS
    assert len({step["loss"] for step in expected}) == STEPS
    for of_rank in runs[split]:
        for ours, theirs in zip(of_rank[family]["steps"], expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)


@pytest.mark.parametrize("family", RESUMED)
def test_a_checkpoint_of_one_process_goes_on_on_two(runs, family):
    expected = runs["one"][0][family]["steps"][STEPS // 2 :]
    for ours, theirs in zip(runs["resumed"][0][family]["steps"], expected, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
        assert ours["learning rate"] == theirs["learning rate"]


def test_a_checkpoint_of_one_process_goes_on_sharded_over_four(runs):
    """FSDP2, two times two, with what was saved by one process."""
    expected = runs["one"][0]["cogview4"]
    for of_rank in runs["sharded"]:
        assert "on 2 of 4 ranks" in of_rank["report"]
        for ours, theirs in zip(of_rank["steps"], expected["steps"][STEPS // 2 :], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
    saved, alone = (load_file(each["path"]) for each in (runs["sharded"][0], expected))
    assert saved.keys() == alone.keys()
    assert all(saved[name].allclose(alone[name], atol=1e-4) for name in alone)


def test_mixed_precision_is_the_same_sharded(runs):
    """The same casts, and so nearly the same bits: bfloat16 in other places would be off by some 1e-2."""
    plain, sharded = runs["mixed"]
    for [expected], ours in zip(plain, sharded, strict=True):
        for mine, theirs in zip(ours["steps"], expected["steps"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)


def test_it_was_split_as_asked(runs):
    for name, words in {
        "ring": "a ring (alltoall) of 2",
        "ulysses": "Ulysses over 2",
        "dp x cp": "on 2 of 4 ranks",
    }.items():
        for family in TRAINED[name]:
            assert words in runs[name][0][family]["report"]
    assert runs["one"][0]["flux"]["report"] is None


@pytest.mark.thorough
@pytest.mark.parametrize("adapter", ["dora", "loha", "lokr", "oft", "ia3"])
def test_other_adapters_over_split_sequences(run_worlds, settings_of, adapter):
    common = {"steps": 3, "adapter": adapter, "adapter_init": "default", "batch_size": 2}
    common |= {"rank": 16} if adapter == "ia3" else {}
    one, two = settings_of("cogview4", **common), settings_of("cogview4", **common, cp_degree=2)
    [[alone], several] = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_all, {"several": [two]}))
    for of_rank in several:
        for ours, theirs in zip(of_rank[0]["steps"], alone[0]["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
    found, expected = load_file(several[0][0]["path"]), load_file(alone[0]["path"])
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, atol=1e-4, rtol=1e-4, msg=name)
