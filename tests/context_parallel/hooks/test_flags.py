"""Masks that users give to a model: those for the full sequence, on every rank, as on one device."""

import pytest
import torch

from diffusers_attn import AttentionProviderError, DispatchProcessor
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel

from ..models import MESHES, build, inputs

REFUSED = {
    "tokens that are not there": (lambda flags: flags.new_ones(flags.shape[0], flags.shape[1] + 1), "[2, {more}]"),
    "other samples": (lambda flags: flags[:1, None, None].repeat(3, 1, 1, 1), "[3, 1, 1, {tokens}]"),
    "integers": (lambda flags: flags.long(), "dtype torch.int64"),
}


def masks(tokens):
    """By name, all that one device takes for a model of two samples with four heads."""
    flags = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) > 0.4
    rows = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    bias = torch.randn(2, tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {
        "flags": flags,
        "flags, added": bias,
        "flags of samples": flags[:, None, None],
        "rows": rows,
        "rows of samples": rows[None, None],
        "rows of heads": rows[None, None] & (torch.arange(4) < 9)[None, :, None, None],
    }


def flags(meshes, ring, ulysses, rotate_method):
    """Largest relative difference to one process for every mask, and the messages for masks that do not fit."""
    model = build("flux")
    model.set_attn_processor(DispatchProcessor("native"))
    given = inputs("flux")
    tokens = given["hidden_states"].shape[1] + given["encoder_hidden_states"].shape[1]

    def run(mask):
        with torch.no_grad():
            return model(**given, joint_attention_kwargs={"attention_mask": mask}).sample

    expected = {name: run(mask) for name, mask in masks(tokens).items()}
    apply_context_parallel(model, meshes(ring, ulysses, rotate_method=rotate_method))
    errors = {
        name: ((run(mask) - expected[name]).norm() / expected[name].norm()).item()
        for name, mask in masks(tokens).items()
    }
    refusals = {}
    for name, (make, expected_words) in REFUSED.items():
        with pytest.raises(AttentionProviderError) as caught:
            run(make(masks(tokens)["flags"]))
        refusals[name] = expected_words.format(more=tokens + 1, tokens=tokens), str(caught.value)
    remove_context_parallel(model)
    return errors, refusals


@pytest.mark.parametrize("mesh", ["ulysses 2", "gather 2", "ring 3", "gather 2 x ulysses 2"])
def test_masks_of_all_tokens(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    for errors, refusals in pool.run(ring * ulysses, flags, ring=ring, ulysses=ulysses, rotate_method=method):
        assert not {name: each for name, each in errors.items() if not each < 1e-6}
        for expected, message in refusals.values():
            assert expected in message
