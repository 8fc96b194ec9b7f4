"""Recording of split models as CUDA graphs, when context parallelism is enabled."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch.distributed as dist

from ..context_parallel.comm.everyone import everyone
from ..runtime.cuda_graphs import apply
from .choices import Choices


def record(chosen: Choices, device: str, groups: Sequence[dist.ProcessGroup]) -> str:
    """Applies CUDA graphs to the split models as the user chose, on all ranks of `groups` alike. All must call it.

    Args:
        device: device type of the models.

    Returns:
        Whether steps are replayed, and if not, why, as a clause for the report; empty on devices other than "cuda".

    Raises:
        AttentionProviderError: graphs were asked for, and a model cannot be recorded.
    """
    reasons: dict[str, None] = {}
    agree = functools.partial(everyone, groups=tuple(groups))
    for target in chosen.targets:
        if chosen.cuda_graphs is True:
            apply.apply_on_ranks(target.model, None)
        elif chosen.cuda_graphs is False or device != "cuda":
            apply.remove_automatic(target.model)
        else:
            reason = next((each for each in agree(apply.why_not(target.model)) if each is not None), None)
            if reason is None:
                apply.apply_on_ranks(target.model, agree)
            else:
                reasons[reason] = None
    if device != "cuda":
        return ""
    if chosen.cuda_graphs is False:
        return "no CUDA graphs, as asked for"
    return f"no CUDA graphs: {'; '.join(reasons)}" if reasons else "steps are replayed as CUDA graphs"
