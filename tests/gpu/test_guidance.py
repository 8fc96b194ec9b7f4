"""Guidance divided between GPUs: the latents of one GPU, also with compiled blocks and recorded steps."""

from __future__ import annotations

import pytest

from diffusers_attn import apply_compile, cuda_graphs_status, disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.guided_call import guided_call

from ..context_parallel.pool import Pool
from ..guidance.families import STEPS, build, draw
from .test_context_parallel import SIZE, TIMEOUT, work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(SIZE < 2, reason=f"needs two CUDA devices or more; PyTorch sees {SIZE}"),
]


@pytest.fixture(scope="module")
def gpus():
    """One process for each GPU."""
    workers = Pool(work, SIZE, TIMEOUT)
    yield workers
    workers.close()


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
