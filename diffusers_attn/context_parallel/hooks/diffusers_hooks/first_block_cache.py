"""FirstBlockCache: ranks decide by the residual of the full sequence, as one process does.

Private names of diffusers in this file: `_should_compute_remaining_blocks` of the hook; `head_block_residual` of its
state.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ....errors import AttentionProviderError
from ...sequences.tracker import SequenceTracker
from .over_ranks import own_tokens, sum_over_ranks, token_dim
from .replacing import replace

DECIDE = "_should_compute_remaining_blocks"


def adapt(hook: Any, tracker: SequenceTracker) -> None:
    """Replaces the decision of an `FBCHeadBlockHook`."""
    replace(hook, hook, DECIDE, functools.partial(_first_block_changed, hook, tracker))


@torch.compiler.disable
def _first_block_changed(hook: Any, tracker: SequenceTracker, residual: Tensor) -> bool:
    before = hook.state_manager.get_state().head_block_residual
    same_shape = before is not None and before.shape == residual.shape
    own: Tensor | None = None
    own_before: Tensor | None = None
    if same_shape:
        own, own_before = (own_tokens(each, tracker, token_dim(residual)) for each in (residual, before))
    usable = own is not None
    numbers = residual.new_zeros(5, dtype=torch.float64)
    if own is not None and own_before is not None:
        numbers[0] = (own - own_before).abs().sum(dtype=torch.float64)
        numbers[1] = own_before.abs().sum(dtype=torch.float64)
    numbers[2:] += torch.tensor([0 if own is None else own.numel(), before is not None, usable], device=numbers.device)
    change, size, count, ranks_with_residual, ranks_usable = sum_over_ranks(numbers, tracker).tolist()
    if ranks_with_residual == 0:
        return True
    if ranks_with_residual < tracker.mesh.size or ranks_usable < ranks_with_residual:
        raise AttentionProviderError(
            "FirstBlockCache compares the first block's residual with that of the forward before. Of "
            f"{tracker.mesh.size} ranks, {int(ranks_with_residual)} have one, and {int(ranks_usable)} have one of the "
            "same size. Begin anew on all ranks when the size changes: model._reset_stateful_cache()."
        )
    # Rounded as one process rounds its means.
    means = torch.tensor([change, size], dtype=torch.float64) / count
    change_mean, size_mean = means.to(residual.dtype)
    return (change_mean / size_mean).item() > hook.threshold
