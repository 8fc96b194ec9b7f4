"""MagCache: calibration prints the ratios of the full sequence. Its decisions depend on the step only.

Private names of diffusers in this file: `_perform_calibration_step` of the hook, and `previous_residual` and
`calibration_ratios` of its state.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ....errors import AttentionProviderError
from ...sequences.tracker import SequenceTracker
from .over_ranks import own_tokens, sum_over_ranks, token_dim
from .replacing import replace

CALIBRATE = "_perform_calibration_step"


def adapt(hook: Any, tracker: SequenceTracker) -> None:
    """Replaces the calibration of a `MagCacheBlockHook`."""
    replace(hook, hook, CALIBRATE, functools.partial(_calibrate, hook, tracker))


@torch.compiler.disable
def _calibrate(hook: Any, tracker: SequenceTracker, state: Any, residual: Tensor) -> None:
    ratio = 1.0
    if state.previous_residual is not None:
        now, before = (torch.linalg.norm(each.float(), dim=-1) for each in (residual, state.previous_residual))
        ratios = own_tokens(now / (before + 1e-8), tracker, token_dim(residual))
        numbers = residual.new_zeros(3, dtype=torch.float64)
        if ratios is not None:
            numbers[0] = ratios.sum(dtype=torch.float64)
            numbers[1:] += torch.tensor([ratios.numel(), 1], device=numbers.device)
        total, count, ranks_usable = sum_over_ranks(numbers, tracker).tolist()
        if ranks_usable < tracker.mesh.size:
            raise AttentionProviderError(
                "MagCache cannot be calibrated here: the lengths of this forward's sequences do not tell which tokens "
                f"are this rank's own ({tracker.describe()}). Calibrate it on one device."
            )
        ratio = total / count if count else math.nan
    state.calibration_ratios.append(ratio)
