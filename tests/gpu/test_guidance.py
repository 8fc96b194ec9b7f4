"""Guidance and batches divided between GPUs: the latents of one GPU, also with compiled blocks and recorded steps, with
a step cache of diffusers, and with ControlNets."""

from __future__ import annotations

import pytest

from diffusers_attn import apply_compile, cuda_graphs_status, disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.installed import guided_call

from ..guidance.families import STEPS, build, draw
from ..guidance.test_pipelines import CACHED, CACHES
from ..parallelize import test_controlnets as controlnets
from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS


def family(meshes, name, compiled):
    expected = draw(build(name).to("cuda"), name).cpu()
    pipe = build(name).to("cuda")
    if compiled:
        apply_compile(pipe.transformer)
    enable_context_parallel(pipe, verbose=False)
    answers = []
    for _ in range(3):
        before = guided_call(pipe.transformer).computed
        found = draw(pipe, name).cpu()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        answers.append((error, guided_call(pipe.transformer).computed - before))
    status = cuda_graphs_status(pipe.transformer)
    disable_context_parallel(pipe)
    return answers, status.replays, status.reasons


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["wan", "qwenimage", "sd3"])
def test_a_family(gpus, name, compiled):
    for answers, replays, reasons in gpus.run(SIZE, family, name=name, compiled=compiled):
        # Compiled blocks round the float32 parts of these models otherwise.
        assert all(error < (1e-6 if compiled else 1e-10) for error, _ in answers), answers
        assert answers[-1][1] == STEPS
        assert replays > STEPS or reasons, (replays, reasons)
        print(name, compiled, answers, replays, reasons)


def images(meshes):
    """Errors of an uneven batch on groups of ranks, and the calls of the transformer that this rank computes."""
    more = {"steps": 2, "num_videos_per_prompt": 2 * SIZE - 1}
    expected = draw(build("wan").to("cuda"), "wan", **more).cpu()
    pipe = build("wan").to("cuda")
    enable_context_parallel(pipe, verbose=False, data_degree=SIZE, guidance_degree=1)
    answers = []
    for _ in range(3):
        before = guided_call(pipe.transformer).computed
        error = (draw(pipe, "wan", **more).cpu() - expected).abs().max() / expected.abs().max()
        answers.append((error.item(), guided_call(pipe.transformer).computed - before))
    disable_context_parallel(pipe)
    return answers


def test_a_batch_divided_unevenly(gpus):
    for answers in gpus.run(SIZE, images):
        assert all(error < 1e-10 for error, _ in answers), answers
        assert answers[-1][1] == 4  # two steps, and both branches of this rank's images


def cached(meshes, cache):
    pipes = build("wan").to("cuda"), build("wan").to("cuda")
    for pipe in pipes:
        pipe.transformer.enable_cache(CACHES[cache]())
    enable_context_parallel(pipes[1], verbose=False)
    errors = []
    for seed in (0, 1, 1):
        expected, found = (draw(pipe, "wan", steps=CACHED, seed=seed).cpu() for pipe in pipes)
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    effect = (expected - draw(build("wan").to("cuda"), "wan", steps=CACHED, seed=1).cpu()).abs().max().item()
    disable_context_parallel(pipes[1])
    return errors, effect


@pytest.mark.parametrize("cache", ["FirstBlockCache", "TaylorSeer"])
def test_a_cache_of_diffusers(gpus, cache):
    for errors, effect in gpus.run(SIZE, cached, cache=cache):
        assert all(error < 1e-10 for error in errors) and effect > 1e-10, (errors, effect)  # the cache has an effect


def with_controlnets(meshes, make, **degrees):
    pipe, _, call = make()
    pipe.to("cuda")
    call = {key: value.to("cuda") if hasattr(value, "to") else value for key, value in call.items()}
    expected = controlnets.draw(pipe, call).cpu()
    report = enable_context_parallel(pipe, verbose=False, **degrees)
    found = [controlnets.draw(pipe, call).cpu() for _ in range(3)]
    disable_context_parallel(pipe)
    return report.models, [((each - expected).abs().max() / expected.abs().max()).item() for each in found]


@pytest.mark.parametrize(("make", "degree"), [(controlnets.flux, 1), (controlnets.sd3, None)], ids=["flux", "sd3"])
def test_controlnets(gpus, make, degree):
    """Two ControlNets of Flux with their sequences split; one of SD3 with guidance divided."""
    for models, errors in gpus.run(SIZE, with_controlnets, make=make, guidance_degree=degree):
        assert len(models) == (3 if make is controlnets.flux else 2), models
        assert all(error < 1e-10 for error in errors), errors
