"""CUDA graphs under what users stack, and features that need a GPU: each cell has the outcome that
docs/compatibility.md shows."""

from __future__ import annotations

import pytest

from ..compatibility.cell import ALL_WAYS, is_sound, on_all_ranks
from ..compatibility.features import FEATURES
from ..compatibility.on_gpus import GPU_CELLS
from ..compatibility.outcomes import ON_GPUS, expected_outcomes, merged
from .several import SIZE


def _marks(way):
    ranks = ALL_WAYS[way].ranks
    several = pytest.mark.skipif(ranks > SIZE, reason=f"needs {ranks} CUDA devices; PyTorch sees {SIZE}")
    return [pytest.mark.gpu] + ([pytest.mark.multi_gpu, several] if ranks > 1 else [])


@pytest.mark.parametrize(("feature", "way"), [pytest.param(name, way, marks=_marks(way)) for name, way in GPU_CELLS])
def test_a_cell(request, feature, way):
    if FEATURES[feature].missing:
        pytest.skip(f"{FEATURES[feature].missing} is not installed, and {feature} does not exist without it")
    pool = request.getfixturevalue("gpus") if ALL_WAYS[way].ranks > 1 else None
    found = merged(on_all_ranks(pool, feature, way))
    print(f"{feature} · {way}: {found}")
    assert all(map(is_sound, [found] if isinstance(found, str) else found.values())), found
    expected = expected_outcomes(ON_GPUS).get(feature, {})
    assert found == expected.get(way, found)
