"""Recording of split models as CUDA graphs, when context parallelism is enabled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.hooks.apply import names_of_groups
from ..errors import AttentionProviderError
from ..runtime.cuda_graphs import apply
from ..runtime.cuda_graphs.graphs import Agree
from .choices import Choices


def record(chosen: Choices, device: str) -> str:
    """Applies CUDA graphs to the split models as the user chose, on all their ranks alike. All must call it.

    Args:
        device: device type of the models.

    Returns:
        Whether steps are replayed, and if not, why, as a clause for the report; empty on devices other than "cuda".

    Raises:
        AttentionProviderError: graphs were asked for, and a model cannot be recorded.
    """
    reasons: dict[str, None] = {}
    for target in chosen.targets:
        agree = _gather_in_forward(target.model)
        if chosen.cuda_graphs is True:
            _apply_or_raise(target.model, agree)
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


def _gather_in_forward(model: nn.Module) -> Callable[[Any], Sequence[Any]]:
    """Gathers a value from the ranks that split the forward of `model` that runs now: with guidance, one group's."""
    reference = weakref.ref(model)

    def agree(value: Any) -> Sequence[Any]:
        now = reference()
        groups: list[dist.ProcessGroup | None] = [resolve(name) for name in names_of_groups(now)] if now else []
        return everyone(value, groups)

    return agree


def _apply_or_raise(model: nn.Module, agree: Agree) -> None:
    """Applies CUDA graphs on all ranks. Raises AttentionProviderError on all ranks if one of them cannot."""
    problem: AttentionProviderError | None = None
    try:
        apply.apply_on_ranks(model, None)
    except AttentionProviderError as error:
        problem = error
    reason = next((each for each in agree(None if problem is None else str(problem)) if each is not None), None)
    if problem is not None:
        raise problem
    if reason is not None:
        raise AttentionProviderError(f"another rank cannot record CUDA graphs: {reason}")
