"""Guidance divided among groups of ranks: unmodified pipelines give the latents of one process."""

from __future__ import annotations

import copy
import functools
import pickle

import diffusers
import pytest
import torch

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.installed import guided_call

from ..marks import thorough_but
from .families import FAMILIES, STEPS, build, draw

RANKS = 4
TWO_BRANCHES = [name for name in FAMILIES if name != "ltx2"]


@functools.cache
def alone(name, **options):
    """The latents of one process, and its number of calls of the transformer."""
    pipe, calls = build(name), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    return draw(pipe, name, **options), len(calls)


def error(one, other):
    # Some pipelines have their latents in float32 in any case.
    scale = 1 if other.dtype == torch.float64 else torch.finfo(torch.float32).eps / 1e-13
    return ((one - other).abs().max() / other.abs().max()).item() / scale


def computed(pipe, name, **options):
    """The error of a call, and the number of calls of the transformer that this rank computes."""
    call = guided_call(pipe.transformer)
    before = call.computed
    result = draw(pipe, name, **options)
    return error(result, alone(name, **options)[0]), call.computed - before


def family(meshes, name):
    pipe = build(name)
    report = enable_context_parallel(pipe, verbose=False)
    answers = [computed(pipe, name) for _ in range(2)]
    unguided = computed(pipe, name, scale=1)
    disable_context_parallel(pipe)
    rest = guided_call(pipe.transformer), error(draw(pipe, name), alone(name)[0])
    return report.guidance, answers, unguided, rest, alone(name)[1]


@pytest.mark.parametrize("name", thorough_but(["wan", "qwenimage", "sd3", "z_image", "ltx"], TWO_BRANCHES))
def test_a_family(pool, name):
    for guidance, answers, (off, calls), rest, all_calls in pool.run(RANKS, family, name=name):
        assert guidance.startswith("branches of guidance and samples of a batch by groups of ranks")
        assert all(found < 1e-10 for found, _ in answers) and off < 1e-10
        # One call per branch: of the two of a step, a group computes one. In one batch, it computes a part of each.
        assert answers[-1][1] == STEPS and all_calls in (STEPS, 2 * STEPS)
        assert calls <= STEPS  # the first step may still be planned as a guided one
        assert rest == (None, pytest.approx(0, abs=1e-10))


def guided_four_ways(meshes):
    """Errors, and the calls that this rank computes, of LTX 2 with four kinds of forwards in a step."""
    found = {}
    for degree in (2, 4):
        pipe = build("ltx2")
        enable_context_parallel(pipe, verbose=False, guidance_degree=degree)
        found[degree] = [computed(pipe, "ltx2", steps=2) for _ in range(2)]
        disable_context_parallel(pipe)
    return found, alone("ltx2", steps=2)[1]


def test_a_step_with_four_branches(pool):
    """Text guidance has both branches in one batch, which two groups divide. The pipeline uses each output before it
    makes the next call, so that all ranks compute the others together."""
    for found, all_calls in pool.run(RANKS, guided_four_ways):
        assert all_calls == 6 and set(found) == {2, 4}
        assert all(error < 1e-10 for answers in found.values() for error, _ in answers)
        assert [calls for _, calls in found[4]] == [6, 6]


def every_case(meshes):
    """Errors of calls that are not as the one before."""
    pipe = build("wan")
    enable_context_parallel(pipe, verbose=False)
    rank = torch.distributed.get_rank()
    found = {}
    computed(pipe, "wan")

    # All ranks use the latents and prompts of the first, also for branches that it does not compute.
    call = guided_call(pipe.transformer)
    noise = draw(pipe, "wan", seed=rank)
    found["noise of the first rank"] = error(noise, alone("wan", seed=0)[0]) if rank == 0 else 0
    generator = torch.Generator().manual_seed(100 + rank)
    negative = torch.randn(1, 13, 32, generator=generator, dtype=torch.float64)
    first = torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    expected_of_first = draw(build("wan"), "wan", negative_prompt_embeds=first)
    found["prompt of the first rank"] = error(draw(pipe, "wan", negative_prompt_embeds=negative), expected_of_first)

    # Guidance that stops, and a callback that changes the latents.
    def change(pipe, step, time, kept):
        if step == 1:
            pipe._guidance_scale = 1.0
        return {"latents": kept["latents"] * 1.5}

    expected = draw(build("wan"), "wan", callback_on_step_end=change)
    found["guidance that stops"] = error(draw(pipe, "wan", callback_on_step_end=change), expected)
    found["and begins again"], number = computed(pipe, "wan")

    # Other sizes, and two videos of one prompt: a batch of two in both branches.
    found["another size"], _ = computed(pipe, "wan", height=112)
    both, _ = alone("wan", num_videos_per_prompt=2)
    found["a batch"] = error(draw(pipe, "wan", num_videos_per_prompt=2), both)
    call, before = guided_call(pipe.transformer), guided_call(pipe.transformer).computed
    draw(pipe, "wan", num_videos_per_prompt=2)
    batch = call.computed - before

    # Inference tensors do not count their changes in place.
    with torch.inference_mode():
        found["inference mode"] = error(draw(pipe, "wan", negative_prompt_embeds=negative), expected_of_first)

    # Copies are models of their own.
    copied = copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))
    other = build("wan")
    for each in copied:
        other.transformer = each
        found[f"copy {len(found)}"] = error(draw(other, "wan"), alone("wan")[0]) + (guided_call(each) is not None)

    # Where a gradient is recorded, and in training, every rank makes every call.
    given = {"hidden_states": torch.ones(1, 4, 2, 10, 6, dtype=torch.float64), "timestep": torch.ones(1),
             "encoder_hidden_states": torch.ones(1, 13, 32, dtype=torch.float64)}  # fmt: skip
    before = call.computed
    pipe.transformer(**given).sample.sum().backward()
    found["gradients"] = float(call.computed - before)
    return found, number, batch


def test_calls_of_other_kinds(pool):
    for found, number, batch in pool.run(RANKS, every_case):
        assert {name: value for name, value in found.items() if not value < 1e-10} == {}
        assert number <= STEPS + 1
        assert batch == STEPS  # each of four groups computes one of two samples in one branch


def dependent(meshes):
    """Steps whose second call needs the output of the first: the error, and the computed calls of each step."""

    def steps(model, calls):
        latents, found = torch.ones(1, 4, 2, 10, 6, dtype=torch.float64), []
        for _ in range(4):
            before, prompt = calls(), torch.ones(1, 13, 32, dtype=torch.float64)
            with torch.no_grad():
                for _ in range(2):
                    out = model(latents, torch.ones(1), prompt, return_dict=False)[0]
                    prompt = prompt * (1 + out.mean())
                latents = latents - 0.1 * out
            found.append(calls() - before)
        return latents, found

    model = build("wan").transformer
    expected, _ = steps(model, lambda: 0)
    enable_context_parallel(model, guidance_degree=2, verbose=False)
    result, found = steps(model, lambda: guided_call(model).computed)
    disable_context_parallel(model)
    return error(result, expected), found


def test_calls_that_depend_on_each_other(pool):
    for found, computed_calls in pool.run(RANKS, dependent):
        assert found < 1e-10
        # The first step is computed whole. In the second, each group computes one call while the other waits. After
        # that all ranks compute both together.
        assert computed_calls == [2, 1, 2, 2]


CACHES = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d\.attn1"]
    ),
    "MagCache": lambda: diffusers.MagCacheConfig(
        mag_ratios=torch.tensor([1.0] * CACHED), num_inference_steps=CACHED, threshold=1.0, retention_ratio=0.2
    ),
    # Counts the calls of both branches.
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}
CACHED = 6


def stops(pipe, step, time, kept):
    """Guidance stops within the run of a cache, and its one branch has a state in one group."""
    if step == 3:
        pipe._guidance_scale = 1.0
    return {}


def cached(meshes, cache, **degrees):
    """Errors, and this rank's calls, under a cache of diffusers, which keeps a state from step to step."""
    pipes, results = (build("wan"), build("wan")), []
    for pipe in pipes:
        pipe.transformer.enable_cache(CACHES[cache]())
    enable_context_parallel(pipes[1], verbose=False, **degrees)
    call = guided_call(pipes[1].transformer)
    for options in ({}, {"seed": 1}, {"callback_on_step_end": stops}, {}):
        expected, before = draw(pipes[0], "wan", steps=CACHED, **options), call.computed
        results.append((error(draw(pipes[1], "wan", steps=CACHED, **options), expected), call.computed - before))
    effect = error(expected, draw(build("wan"), "wan", steps=CACHED))
    pipes[1].transformer.disable_cache()
    after = [computed(pipes[1], "wan") for _ in range(2)]
    disable_context_parallel(pipes[1])
    return results, effect, after


@pytest.mark.parametrize("cache", thorough_but(["FirstBlockCache", "TaylorSeer"], CACHES))
def test_a_cache_of_diffusers(pool, cache):
    for results, effect, after in pool.run(RANKS, cached, cache=cache):
        assert all(found < 1e-10 for found, _ in results) and effect > 1e-10  # the cache changes the result
        if cache != "PyramidAttentionBroadcast":
            # Each group computes the first step whole, and of later ones its branch: when guidance stops, one group.
            first, second, stopped, last = (calls for _, calls in results)
            assert (first, second, last) == (CACHED + 1, CACHED, CACHED) and stopped in (4, CACHED)
        assert all(each < 1e-10 for each, _ in after) and after[-1][1] == STEPS


def sharded(meshes):
    """Errors with weights of which each rank has a part: all ranks gather them in every forward of any of them."""

    def change(pipe, step, time, kept):
        if step == 1:
            pipe._guidance_scale = 1.0
        return {}

    pipe, found = build("wan"), []
    enable_context_parallel(pipe, verbose=False, shard_weights=True)
    for options in ({}, {}, {"callback_on_step_end": change}, {}, {"num_videos_per_prompt": 2}):
        expected = draw(build("wan"), "wan", **options)
        found.append(error(draw(pipe, "wan", **options), expected))
    disable_context_parallel(pipe)
    return found


def test_sharded_weights(pool):
    for found in pool.run(RANKS, sharded):
        assert max(found) < 1e-10


def choices(meshes):
    lines, messages = {}, {}
    pipe = build("wan")
    for options in (
        {"guidance_degree": 1},
        {"guidance_degree": 2, "ulysses_degree": 2},
        {"guidance_degree": 4},
        {"guidance_degree": 2, "ring_degree": 2},
        {"ulysses_degree": 2, "ring_degree": 2},
    ):
        report = enable_context_parallel(pipe, verbose=False, **options)
        result = error(draw(pipe, "wan"), alone("wan")[0])
        lines[str(options)] = report.guidance, result, guided_call(pipe.transformer) is not None
        disable_context_parallel(pipe)
    for options in ({"guidance_degree": 3}, {"guidance_degree": 4, "ring_degree": 2}, {"guidance_degree": 2.0}):
        with pytest.raises(AttentionProviderError) as caught:
            enable_context_parallel(pipe, verbose=False, **options)
        messages[str(options)] = str(caught.value)
    for inputs in ("check", "trust"):
        report = enable_context_parallel(pipe, verbose=False, inputs=inputs)
        results = [error(draw(pipe, "wan"), alone("wan")[0]) for _ in range(2)]
        lines[inputs] = report.guidance, max(results), guided_call(pipe.transformer) is not None
        disable_context_parallel(pipe)
    with pytest.raises(AttentionProviderError) as caught:
        enable_context_parallel(pipe, verbose=False, guidance_degree=2, inputs="check")
    messages["check"] = str(caught.value)
    with pytest.raises(AttentionProviderError) as caught:
        enable_context_parallel(pipe, verbose=False, guidance_degree=2, mesh=meshes.lines[4])
    messages["mesh"] = str(caught.value)
    model = enable_context_parallel(pipe.transformer, verbose=False).guidance
    disable_context_parallel(pipe)
    return lines, messages, model


def test_degrees(pool):
    for lines, messages, model in pool.run(RANKS, choices):
        assert all(result < 1e-10 for _, result, _ in lines.values())
        found = [(line, divided) for line, _, divided in lines.values()]
        divided = "branches of guidance and samples of a batch by {} groups of ranks"
        assert found == [
            ("", False),
            (divided.format(2) + ", each with Ulysses over 2", True),
            (divided.format(4), True),
            (divided.format(2) + ", each with a ring of 2", True),
            ("", False),
            ("", False),
            (divided.replace("{} ", "") + ", each with Ulysses over 2", True),
        ]
        assert model == ""  # a model alone has no guidance
        assert "inputs='check' compares the values" in messages["check"]
        assert "must divide the 4 ranks; accepted are 1, 2, 4" in messages["{'guidance_degree': 3}"]
        assert "leaves one rank in each group" in messages["{'guidance_degree': 4, 'ring_degree': 2}"]
        assert "accepted are 1, 2, 4" in messages["{'guidance_degree': 2.0}"]
        assert "mesh=... names some" in messages["mesh"]
