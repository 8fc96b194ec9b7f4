"""Keys that ranks make from their own tokens are refused over NCCL too, eagerly and in compiled blocks."""

from __future__ import annotations

import pytest
import torch

from ..context_parallel.sequences.test_local_keys import KEYS, assert_refused, attended
from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS


def on_gpus(meshes, **arguments):
    torch.manual_seed(0)
    return attended(meshes("gather"), **arguments, device="cuda", dtype=torch.float16, backend="inductor")


@pytest.mark.parametrize("compiled", [None, "blocks"])
def test_keys_that_all_ranks_have(gpus, compiled):
    assert max(gpus.run(SIZE, on_gpus, keys="the text", compiled=compiled)) < 0.05


@pytest.mark.parametrize("compiled", [None, "blocks"])
@pytest.mark.parametrize("keys", KEYS)
def test_keys_that_a_rank_makes_of_its_own_tokens(gpus, keys, compiled):
    for messages in gpus.run(SIZE, on_gpus, keys=keys, compiled=compiled):
        assert_refused(messages)
