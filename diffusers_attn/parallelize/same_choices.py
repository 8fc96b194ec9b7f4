"""The comparison of the ranks' choices, before the first model is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.rank_differences import differences
from ..errors import AttentionProviderError
from .choices import Choices


def choose_on_all_ranks(choose_here: Callable[[], Choices], axes: Sequence[dist.ProcessGroup | None]) -> Choices:
    """Calls `choose_here` on every rank, and returns its result if all ranks made the same choices.

    Args:
        choose_here: makes this rank's choices.
        axes: groups of the ranks that share a sequence, the ring's first; None is all ranks of the job.

    Raises:
        AttentionProviderError: it failed on some rank, or the ranks chose differently. On all ranks.
    """
    problem: Exception | None = None
    try:
        chosen = choose_here()
        answer: dict[str, str] | str = _in_words(chosen)
        digest = hashlib.sha256(repr(sorted(chosen.facts.items())).encode()).hexdigest()
    except Exception as error:  # every type, since the others must not wait for this rank
        problem, answer, digest = error, f"{type(error).__name__}: {error}", ""
    answers = everyone((dist.get_rank(), problem is None, answer, digest), axes)
    if problem is not None:
        raise problem
    for rank, succeeded, error_there, _ in answers:
        if not succeeded:
            raise AttentionProviderError(f"context parallelism cannot be enabled on rank {rank}: {error_there}")
    unlike = differences([(rank, choices) for rank, _, choices, _ in answers])
    if unlike:
        raise AttentionProviderError(
            f"the ranks called enable_context_parallel with different choices. {'. '.join(unlike)}. Give the same "
            "arguments and the same models on all of them."
        )
    if len({digest for *_, digest in answers}) > 1:
        lines = differences(everyone((dist.get_rank(), chosen.facts), axes))
        more = f". And {len(lines) - 8} more" if len(lines) > 8 else ""
        raise AttentionProviderError(
            f"the ranks that would share a sequence differ. {'. '.join(lines[:8])}{more}. Load the same model with the "
            "same adapters, and use the same plan, provider and versions on all of them."
        )
    return chosen


def _in_words(chosen: Choices) -> dict[str, str]:
    """What must be equal on all ranks before they compare their models, by name."""
    degrees = chosen.degrees
    return {
        "models": ", ".join(target.name for target in chosen.targets),
        "attention providers": ", ".join(chosen.providers),
        "degrees": "chosen by all ranks together"
        if degrees is None
        else f"ulysses_degree={degrees.ulysses_degree}, ring_degree={degrees.ring_degree}, "
        f"rotate_method={degrees.rotate_method}",
        "VAEs": ", ".join(vae.name for vae in chosen.vaes) or "none",
        "sharded weights": ", ".join(each.name for each in chosen.weights) or "none",
        "timeout": str(chosen.timeout),
    } | {
        name: str(getattr(chosen, name))
        for name in ("convert_to_fp32", "inputs", "cuda_graphs", "split_vae", "guidance_degree", "data_degree")
    }
