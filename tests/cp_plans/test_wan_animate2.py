"""Wan Animate 2 over ranks, as in one process: positions in the full sequence, and a cache seen frame by frame."""

from __future__ import annotations

import hashlib
import inspect
import pathlib
import re

import pytest
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import (
    WanAnimate2AttnProcessor,
    WanAnimate2Transformer3DModel,
    rope_apply,
)

from diffusers_attn import get_cp_plan
from diffusers_attn.processors import wan_animate2
from diffusers_attn.verify_plan.rank import STRATEGIES, Job, work
from diffusers_attn.verify_plan.verify import _report

from ..context_parallel.models import DISTINCT, MESHES
from ..marks import thorough_but
from .wan_animate2 import (
    LIKE_ONE_PROCESS,
    build,
    compare,
    compare_enabled,
    masks_without_a_compiler,
    passes,
    refusal,
)


def results(pool, job, mesh, **options):
    ring, ulysses, method = MESHES[mesh]
    return pool.run(ring * ulysses, job, ring=ring, ulysses=ulysses, rotate_method=method, **options)


# The first as the pipeline has it on all meshes; the others differ in what is split.
@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        *thorough_but(
            lambda case: case[1] == "as the pipeline" or case[0] in ("gather 2", "ulysses 3"),
            [(mesh, name) for name in LIKE_ONE_PROCESS for mesh in DISTINCT],
        ),
        ("ring 2 x ulysses 2", "as the pipeline"),
        ("gather 2", "last block skipped"),
    ],
)
def test_like_one_process(pool, mesh, name):
    errors = results(pool, compare, mesh, name=name, removal=mesh == "gather 2")
    assert max(map(max, errors)) < 1e-10, errors


@pytest.mark.parametrize("name", LIKE_ONE_PROCESS)
def test_without_exchange_it_is_wrong(pool, name):
    errors = results(pool, compare, "gather 2", name=name, disabled=True)
    assert min(map(min, errors)) > 1e-3, errors


@pytest.mark.parametrize(
    ("ring", "ulysses", "mode", "provider", "filled_before"),
    [
        (2, 1, "broadcast", None, False),
        (2, 1, "broadcast", None, True),
        pytest.param(3, 1, "check", "flex", False, marks=pytest.mark.slow),
        pytest.param(2, 2, "broadcast", "flex", False, marks=pytest.mark.thorough),
    ],
)
def test_a_cache_has_a_rank_s_shard(pool, ring, ulysses, mode, provider, filled_before):
    """A cache that the model filled before it was split has all tokens."""
    options = {"ring": ring, "ulysses": ulysses, "inputs": mode, "provider": provider, "filled_before": filled_before}
    found = pool.run(ring * ulysses, compare_enabled, **options)
    assert max(error for error, _ in found) < 2e-5
    cached = [tokens for _, tokens in found]
    assert cached == [105] * 2 if filled_before else sum(cached) == 105 and max(cached) - min(cached) <= 1


@pytest.mark.parametrize(
    ("provider", "name", "change", "reason"),
    [
        (None, "smaller", None, "WanAnimate2AttnProcessor, sees only this rank's. Bind the module"),
        (
            "native",
            "two samples",
            "another reference",
            r"holds 15 .*; accepted are its shard of 10 or all 30 .* Fill the cache again",
        ),
        (
            "native",
            "too long",
            None,
            "5 frames with 15 tokens .* do not fit origin_len .* allow 4 and 3 frames with 15",
        ),
    ],
)
def test_refused(pool, provider, name, change, reason):
    """On all ranks alike, before attention exchanges anything."""
    for answer in pool.run(3, refusal, provider=provider, name=name, change=change):
        assert re.search(reason, answer), answer


@torch.no_grad()
def verify(meshes, folder, job_of_rank, last):
    rank, name = meshes(2, 1).rank, "smaller"
    given, model = passes(name, torch.float32), build(name, torch.float32)
    with masks_without_a_compiler():
        if last:
            model(**given[0])
        work(job_of_rank, model, given[last], rank, pathlib.Path(folder), lambda **mesh: meshes(**mesh))


@pytest.mark.parametrize("last", [0, 1])
def test_verify_cp_plan_finds_it_right(pool, tmp_path, last):
    job = Job(get_cp_plan(build("smaller")), 2, tuple(STRATEGIES), "native", False, False, 1e-4, 60.0, None)
    pool.run(2, verify, folder=str(tmp_path), job_of_rank=job, last=last)
    report = _report(tmp_path, job, "WanAnimate2Transformer3DModel", [0, 0])
    assert report.ok and report.unexchanged > 1e-2, str(report)


def test_tokens_are_rotated_by_their_places():
    grids = torch.tensor([[3, 4, 5], [3, 5, 4]])
    model = build("smaller", torch.float32)
    angles = model._rope_freqs((2, 0, 7), torch.device("cpu"))
    tensor = torch.randn(2, 60, 4, 16)
    filled_before = rope_apply(tensor, grids, angles, 2)
    for start, length in ((0, 60), (13, 29), (59, 1), (7, 0)):
        turns = wan_animate2._turns(angles, grids, 2, start, length)
        found = wan_animate2._rotated(tensor[:, start : start + length], turns)
        assert torch.equal(found, filled_before[:, start : start + length])


# Of the source that own code stands in for. Where one differs: read what has changed in diffusers, follow it in
# processors/wan_animate2.py, and write the new value here.
SOURCES = {
    WanAnimate2AttnProcessor.__call__: "aada122ed60485b8",
    WanAnimate2Transformer3DModel.create_mask: "b069c2b6fbf5ceb8",
    rope_apply: "443d33a29d314386",
}


@pytest.mark.parametrize("function", SOURCES, ids=lambda function: function.__qualname__)
def test_what_own_code_stands_in_for_is_unchanged(function):
    found = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    assert found == SOURCES[function], f"{function.__qualname__} has changed: see {wan_animate2.__name__}"
    cls = WanAnimate2AttnProcessor
    assert wan_animate2.PROCESSOR == f"{cls.__module__}.{cls.__qualname__}"
