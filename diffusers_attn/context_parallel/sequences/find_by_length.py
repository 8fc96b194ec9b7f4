"""Finds the sequences of a tensor by its length, where the plan does not name them.

A length that fits nothing, or more than one thing, is refused on all ranks: all of them judge by the sizes of all.
"""

from __future__ import annotations

import itertools

from ...errors import AttentionProviderError
from ...tracing.symbolic import equal
from .layout import SequenceLayout
from .sharding import Shards


def joins(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All ways to join one or more of these sequences, in their order."""
    counts = range(1, len(names) + 1)
    return [join for count in counts for join in itertools.combinations(names, count)]


def find_by_length(layout: SequenceLayout, length: int, candidates: list[tuple[str, ...]], what: str) -> Shards | None:
    """The shards of the joined sequences that have `length` tokens on this rank; None if there are none.

    Args:
        candidates: names of sequences that may be joined.
        what: has this length, for errors.

    Raises:
        AttentionProviderError: on some rank the length fits another candidate with other shards.
    """
    shards_of_all = [layout.shards(names) for names in candidates]
    found = [shards for shards in shards_of_all if shards.sizes[layout.mesh.rank] == length]
    if not found:
        return None
    known = found[-1].sizes
    for sizes in [shards.sizes for shards in shards_of_all]:
        if not equal(sizes, known) and any(one == other for one, other in zip(sizes, known)):
            raise AttentionProviderError(
                f"{what}, {length} tokens on rank {layout.mesh.rank}, could be shards of {sum(known)} tokens or "
                f"of {sum(sizes)} ({layout.describe()}). Name the sequences in the plan: sequence='text' in CPInput "
                "and CPOutput, and CPAttention for the attention modules."
            )
    return found[-1]


def check_lengths_suffice(layout: SequenceLayout, what: str) -> None:
    """Raises AttentionProviderError, on all ranks, if any rank has placeholders or replicated tokens. A length does not
    distinguish these from a rank's own tokens."""
    replicated = [name for name in layout.lengths if name in layout.replicated]
    if replicated:
        raise AttentionProviderError(
            f"every rank has all of '{replicated[0]}', and the plan does not say which sequences {what} is of. "
            "Name them: CPOutput(sequence=...), CPAttention((...))."
        )
    short = [name for name in layout.lengths if layout.has_placeholder(name, layout.mesh.size - 1)]
    if short:
        raise AttentionProviderError(
            f"'{short[0]}' has {layout.lengths[short[0]]} tokens for {layout.mesh.size} ranks, and the plan does not "
            f"say which sequences {what} is of. Name them: CPOutput(sequence=...), CPAttention((...))."
        )
