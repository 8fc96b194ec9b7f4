"""Models that are split by rows or frames refuse fewer than one for each rank, before anything is sent."""

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from tests.zoo import CASES

from ..hooks.test_plan_words import mesh_of


@pytest.mark.parametrize(("name", "what"), [("sana", "rows"), ("sana_video", "frames"), ("sana_wm", "frames")])
def test_fewer_than_ranks_are_refused(name, what):
    inputs = CASES[name].inputs()
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :2]
    for rank in range(3):
        model = CASES[name].build()
        apply_context_parallel(model, mesh_of(rank), None)
        with torch.no_grad(), pytest.raises(AttentionProviderError, match=f"every one of 3 ranks .* {what}: 2"):
            model(**inputs)
