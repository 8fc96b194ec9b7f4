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
        found = (
            [target.name for target in chosen.targets],
            chosen.providers,
            "degrees to be decided" if chosen.degrees is None else chosen.degrees,
            f"convert_to_fp32={chosen.convert_to_fp32}",
            chosen.inputs,
            chosen.cuda_graphs,
            f"split_vae={chosen.split_vae}",
            [vae.name for vae in chosen.vaes],
            f"guidance_degree={chosen.guidance_degree}",
            f"data_degree={chosen.data_degree}",
            *([f"shard_weights={[each.name for each in chosen.weights]}"] if chosen.weights else []),
        )
        summary = ", ".join(map(str, (*found, chosen.timeout)))
        digest = hashlib.sha256(repr(sorted(chosen.facts.items())).encode()).hexdigest()
    except Exception as error:  # every type, since the others must not wait for this rank
        problem, summary, digest = error, f"{type(error).__name__}: {error}", ""
    answers = everyone((dist.get_rank(), problem is None, summary, digest), axes)
    if problem is not None:
        raise problem
    for rank, succeeded, answer, _ in answers:
        if not succeeded:
            raise AttentionProviderError(f"context parallelism cannot be enabled on rank {rank}: {answer}")
    if len({answer for _, _, answer, _ in answers}) > 1:
        listed = "; ".join(f"rank {rank}: {answer}" for rank, _, answer, _ in answers)
        raise AttentionProviderError(
            f"the ranks called enable_context_parallel with different choices. {listed}. Give the same arguments and "
            "the same models on all of them."
        )
    if len({digest for *_, digest in answers}) > 1:
        lines = differences(everyone((dist.get_rank(), chosen.facts), axes))
        more = f". And {len(lines) - 8} more" if len(lines) > 8 else ""
        raise AttentionProviderError(
            f"the ranks that would share a sequence differ. {'. '.join(lines[:8])}{more}. Load the same model with the "
            "same adapters, and use the same plan, provider and versions on all of them."
        )
    return chosen
