"""Each cell of the matrix has the outcome that docs/compatibility.md shows. All of them: `make test-thorough`."""

from __future__ import annotations

import pytest

from ..marks import thorough_but
from .cell import is_sound, on_all_ranks
from .features import FEATURES
from .outcomes import expected_outcomes, merged
from .ways import WAYS

CELLS = [(name, way) for name, feature in FEATURES.items() for way in WAYS if way not in feature.not_under]
QUICK = [
    ("FirstBlockCache", "both"),
    ("Pyramid Attention Broadcast", "guidance"),
    ("`enable_group_offload`, layers", "guidance"),
    ("fused", "weights"),
    ("LoHa", "weights"),
    ("bitsandbytes, NF4", "ring"),
    ("IP-Adapter, Flux", "both"),
    ("perturbed attention, in that of Qwen-Image", "ulysses"),
    ("`torch.save` and `torch.load`", "provider"),
    ("`push_to_hub`", "provider"),
    ("`torch.export(strict=True)`", "guidance"),
    ("another pipeline in another thread at once", "guidance"),
    ("Z-Image, modular", "guidance"),
    ("tiles of the VAE", "vae"),
]


@pytest.mark.parametrize(("feature", "way"), thorough_but(QUICK, CELLS))
def test_a_cell(pool, feature, way):
    if FEATURES[feature].missing:
        pytest.skip(f"{FEATURES[feature].missing} is not installed, and {feature} does not exist without it")
    assert merged(on_all_ranks(pool, feature, way)) == expected_outcomes()[feature][way]


def test_every_cell_has_an_outcome_and_none_is_a_fault():
    outcomes = expected_outcomes()
    assert [(name, way) for name in outcomes for way in sorted(outcomes[name], key=list(WAYS).index)] == CELLS
    for row in outcomes.values():
        for outcome in row.values():
            assert all(map(is_sound, [outcome] if isinstance(outcome, str) else outcome.values()))
