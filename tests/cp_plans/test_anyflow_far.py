"""AnyFlow FAR: chunks of frames, a mask by chunks and a cache of earlier ones, over ranks as in one process."""

from __future__ import annotations

import hashlib
import inspect
import pathlib
import re

import pytest
import torch
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from torch.nn.attention.flex_attention import create_block_mask

from diffusers_attn import get_cp_plan
from diffusers_attn.context_parallel.sequences.block_masks import rows_of
from diffusers_attn.processors import anyflow_far
from diffusers_attn.verify_plan.rank import STRATEGIES, Job, work
from diffusers_attn.verify_plan.verify import _report

from ..context_parallel.models import DISTINCT, MESHES, WITH_VARIANTS
from ..marks import thorough_but
from .anyflow_far import LIMITS, build, cache_of_flex, compare, compare_enabled, compiled, inputs, refusal


def results(pool, job, mesh, **options):
    ring, ulysses, method = MESHES[mesh]
    return pool.run(ring * ulysses, job, ring=ring, ulysses=ulysses, rotate_method=method, **options)


@pytest.mark.parametrize(
    ("mesh", "name"),
    [(mesh, name) for name in LIMITS for mesh in WITH_VARIANTS]
    + [(mesh, "rollout") for mesh in (*DISTINCT, "ring 2 x ulysses 2") if mesh not in WITH_VARIANTS],
)
def test_like_one_process(pool, mesh, name):
    errors = results(pool, compare, mesh, name=name, removal=mesh == "gather 2")
    assert max(map(max, errors)) < 1e-10, errors


@pytest.mark.parametrize("name", LIMITS)
def test_without_exchange_it_is_wrong(pool, name):
    errors = results(pool, compare, "gather 2", name=name, disabled=True)
    assert min(map(min, errors)) > 1e-3, errors


def test_with_gradient_checkpointing(pool):
    errors = results(pool, compare, "gather 2 x ulysses 2", name="clean", checkpointing=True)
    assert max(map(max, errors)) < 1e-10, errors


@pytest.mark.parametrize(
    ("ring", "ulysses", "mode", "provider"),
    thorough_but(
        [(2, 1, "broadcast", None)], [(2, 1, "broadcast", None), (3, 1, "check", "flex"), (2, 2, "broadcast", "flex")]
    ),
)
def test_a_rollout_fills_the_cache_that_it_is_given(pool, ring, ulysses, mode, provider):
    """Whatever becomes of other inputs: a copy of it would be filled in vain, and is as large as all keys."""
    options = {"ring": ring, "ulysses": ulysses, "inputs": mode, "provider": provider}
    for error, is_own in pool.run(ring * ulysses, compare_enabled, **options):
        assert error < 2e-5 and is_own


def test_who_does_not_take_the_mask_leaves_it_to_flex(pool):
    """As on one device, where all goes to flex."""
    assert not anyflow_far._takes_rows(anyflow_far.ProviderChoice.of("_native_flash"))
    for error in pool.run(2, cache_of_flex, provider="_native_flash"):
        assert error < 2e-5


@pytest.mark.parametrize(
    ("provider", "change", "reason"),
    [
        (None, None, "AnyFlowCausalAttnProcessor, sees only this rank's. Bind the module"),
        ("native", "mask with clean frames", r"BlockMask of shape .*128, 128\] is accepted, for 88 tokens"),
        ("native", "mask of all pairs", r"is a Tensor of shape .*model.build_attention_mask"),
    ],
)
def test_refused(pool, provider, change, reason):
    """On all ranks alike, before attention exchanges anything."""
    for answer in pool.run(3, refusal, provider=provider, change=change):
        assert re.search(reason, answer), answer


@pytest.mark.slow
def test_compiles_without_breaks(pool):
    for graphs, error in pool.run(2, compiled, ring=2, ulysses=1):
        assert graphs <= 5  # and no more with more blocks
        assert error < 1e-5


def verify(meshes, folder, job_of_rank):
    rank = meshes(2, 1).rank
    drawn = inputs("compressed", torch.float32)
    model = build("compressed", torch.float32)
    work(job_of_rank, model, drawn, rank, pathlib.Path(folder), lambda **mesh: meshes(**mesh))


def test_verify_cp_plan_finds_it_right(pool, tmp_path):
    plan = get_cp_plan(build("compressed"))
    job = Job(plan, 2, tuple(STRATEGIES), "native", False, False, 1e-4, 60.0, None)
    pool.run(2, verify, folder=str(tmp_path), job_of_rank=job)
    report = _report(tmp_path, job, "AnyFlowFARTransformer3DModel", [0, 0])
    assert report.ok and report.unexchanged > 1e-2, str(report)


def test_rows_of_a_mask_over_the_whole_sequence():
    places = torch.arange(200)

    def sees(batch, head, query, key):
        return (query // 7 >= key // 7) & (query < 150) & (key < 150)

    mask = create_block_mask(sees, None, None, 256, 256, device="cpu")
    expected = sees(0, 0, places[:, None], places)
    for start, length, keys in ((0, 200, 200), (60, 41, 131), (3, 1, 150), (5, 0, 150), (0, 5, 0)):
        rows = rows_of(mask, start, length, keys)
        assert rows.shape == (1, 1, length, keys) and torch.equal(rows[0, 0], expected[start : start + length, :keys])


# Of the source that own code stands in for. Where it differs: read what has changed in diffusers, follow it in
# processors/anyflow_far.py, and write the new value here.
SOURCE = "66a80eb74db4a524"


def test_what_own_code_stands_in_for_is_unchanged():
    found = hashlib.sha256(inspect.getsource(AnyFlowCausalAttnProcessor.__call__).encode()).hexdigest()[:16]
    assert found == SOURCE, f"AnyFlowCausalAttnProcessor.__call__ has changed: see {anyflow_far.__name__}"
    cls = AnyFlowCausalAttnProcessor
    assert anyflow_far.PROCESSOR == f"{cls.__module__}.{cls.__qualname__}"
