"""Kernel options that count positions: exact if the kernel receives full sequences in order, refused otherwise."""

import contextlib
import dataclasses

import pytest
import torch

from diffusers_attn import AttentionProviderError, enable_context_parallel
from diffusers_attn.call import AttentionCall
from diffusers_attn.context_parallel.attention.entry import split_attention
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.roles import REPLICATED, Role
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, split
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker
from diffusers_attn.providers import catalog, registry
from diffusers_attn.providers.aten_kernels import Math

from ... import reference
from ..hooks.test_invariant import MESH
from ..models import MESHES

TEXT, IMAGE = 5, 14
JOINT = Role(("text", "image"), ("text", "image"))
WINDOW = (("window_size", (2, 1)),)


def seen(length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance <= 2) & (distance >= -1)


class Windowed(Math):
    """A kernel with a window that runs here: it counts positions in what it is given, as those of flash do."""

    @classmethod
    def attention(cls, query, key, value, mask=None, *, params):
        assert dict(params.options) == dict(WINDOW) and mask is None
        heads_first = cls.layout == "bhsd"
        tensors = (query, key, value) if heads_first else (each.transpose(1, 2) for each in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, seen(query.shape[2 if heads_first else 1]))
        return out if heads_first else out.transpose(1, 2)


@contextlib.contextmanager
def with_window():
    spec = catalog.SPECS["_native_math"]
    registry.load("_native_math")
    before = registry.ADAPTERS["_native_math", "package"]
    catalog.SPECS["_native_math"] = dataclasses.replace(spec, options={"window_size": catalog.WINDOW})
    registry.ADAPTERS["_native_math", "package"] = Windowed
    try:
        yield
    finally:
        catalog.SPECS["_native_math"], registry.ADAPTERS["_native_math", "package"] = spec, before


def split_sequences(mesh, **lengths):
    tracker = SequenceTracker(mesh)
    for name, length in lengths.items():
        tracker.split(name, torch.zeros(length), 0)
    return tracker


def windows(meshes, ring, ulysses, rotate_method):
    """Errors of one sequence, and of joined sequences whose order is known; or the message of a refusal."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    answers = {}
    for names in (("image",), ("text", "image")):
        tracker = split_sequences(mesh, **{name: {"text": TEXT, "image": IMAGE}[name] for name in names})
        tracker.role = JOINT if len(names) > 1 else None
        shards = tracker.shards(names)
        full = [torch.randn(2, shards.total, 3, 8, dtype=torch.float64) for _ in range(3)]
        local = [split(tensor, shards, 1, mesh.rank) for tensor in full]
        with with_window():
            try:
                out = split_attention(AttentionCall(*local, provider="_native_math", options=WINDOW), tracker)
            except AttentionProviderError as error:
                answers[names] = str(error)
                continue
        expected, _ = reference.attention(*(each.transpose(1, 2) for each in full), seen(shards.total))
        answers[names] = (out - split(expected.transpose(1, 2), shards, 1, mesh.rank)).abs().max().item()
    return answers


@pytest.mark.parametrize("mesh", ["ulysses 2", "ulysses 3", "gather 2", "ring 3", "ring 2 x ulysses 2"])
def test_a_window_is_that_of_the_whole_sequence(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    for answers in pool.run(ring * ulysses, windows, ring=ring, ulysses=ulysses, rotate_method=method):
        for found in answers.values():
            if ring == 1:
                assert found < 1e-12
            else:
                assert "window_size=(2, 1) counts positions" in found and f"ulysses_degree={ring * ulysses}" in found


def tensors(queries, keys):
    return (torch.randn(1, length, 3, 8) for length in (queries, keys, keys))


@pytest.mark.parametrize("what", ["window_size", "is_causal"])
def test_what_counts_positions_is_refused_where_a_rank_does_not_know_them(what):
    """Attention to replicated keys, by lengths and by the plan; and joined sequences in an unknown order."""
    asked = {"is_causal": True} if what == "is_causal" else {"options": WINDOW}
    tracker = split_sequences(MESH, image=IMAGE, text=TEXT)
    own, other = tracker.shards(("image",)).sizes[1], tracker.shards(("text",)).sizes[1]
    with with_window():
        for role, queries, keys in (
            (None, own, 40),
            (Role(("image",), ()), own, 40),
            (Role(("image",), ()), own, own),
            (Role(("image",), ("image",)), own, 40),
        ):
            tracker.role = role
            with pytest.raises(AttentionProviderError, match=f"{what}=.* counts positions.*and all keys"):
                split_attention(AttentionCall(*tensors(queries, keys), provider="_native_math", **asked), tracker)
        for role, queries, keys in ((REPLICATED, 40, 40), (None, 30, 40)):  # all of it is replicated
            tracker.role = role
            found = split_attention(AttentionCall(*tensors(queries, keys), provider="_native_math", **asked), tracker)
            assert found is None
        tracker.role = None
        with pytest.raises(AttentionProviderError, match=f"joined in this call, and {what}=.* needs their order"):
            split_attention(
                AttentionCall(*tensors(own + other, own + other), provider="_native_math", **asked), tracker
            )


def test_a_window_needs_as_many_keys_as_queries_and_no_mask():
    mesh = ContextParallelMesh(ContextParallelConfig(ulysses_degree=3), ALONE, Group("none", 1, 3))
    image, text = Shards.contiguous(IMAGE, 3), Shards.contiguous(TEXT, 3)
    mask = KeyMask(torch.ones(1, image.sizes[1], dtype=torch.bool))
    options = {"provider": "_native_math", "options": WINDOW, "mesh": mesh, "query_shards": image}
    with with_window():
        for keys, given, message in ((text, None, "14 queries and 5 keys"), (image, mask, "14 keys, and a mask")):
            query, key, value = tensors(image.sizes[1], keys.sizes[1])
            with pytest.raises(AttentionProviderError, match=f"equal lengths and no mask. This call has .*{message}"):
                parallel_attention(query, key, value, given, key_shards=keys, **options)


def test_an_option_that_is_off_does_not_count():
    assert catalog.options_by_place("flash", (("softcap", 3.0), ("window_size", (-1, -1)))) == ()
    assert catalog.options_by_place("flash", (("window_size", (4, -1)),)) == ("window_size=(4, -1)",)
    assert catalog.options_by_place("auto", (("lossy", ("sage",)),)) == ()


def enabled(meshes):
    """The message for a ring, and the degrees that are chosen."""
    from diffusers_attn import disable_context_parallel
    from tests.zoo import CASES

    model = CASES["flux"].build()
    with with_window():
        try:
            enable_context_parallel(
                model, mesh=meshes.lines[2], provider="_native_math", window_size=(2, 1), verbose=False
            )
        except AttentionProviderError as error:
            message = str(error)
        report = enable_context_parallel(
            model, mesh=meshes.heads[2], provider="_native_math", window_size=(2, 1), verbose=False
        )
        disable_context_parallel(model)
    return message, report.strategy


def test_enabling_tells(pool):
    for message, strategy in pool.run(2, enabled):
        assert "window_size=(2, 1) counts positions" in message and "ulysses_degree=2, ring_degree=1" in message
        assert strategy == "ulysses"
