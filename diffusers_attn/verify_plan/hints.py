"""A guess at the cause of a difference, from the shapes of the first module that differs."""

from __future__ import annotations

from ..context_parallel.sequences.tracker import SequenceTracker
from ..errors import AttentionProviderError
from .report import Argument

MIXES = ("GroupNorm", "InstanceNorm", "BatchNorm", "Conv", "Pool")
"""Parts of the names of classes that compute across tokens, such as norms and convolutions."""


def hint_of(
    name: str,
    cls: str,
    inputs: tuple[Argument, ...],
    before: str,
    tracker: SequenceTracker,
    routed: bool | None,
    raised: Exception | None,
) -> str:
    """Advice what to check first.

    Args:
        name: name of the module; "" for the model itself.
        cls: name of its class.
        inputs: the shapes of its inputs, on this rank and in one process.
        before: the last module that ended, if the difference is in the model's own code; otherwise "".
        tracker: tracks the sequences of the applied plan.
        routed: whether the attention module called a provider; None for other modules.
        raised: the error that it raised, if any.

    Returns:
        A sentence. "" if the error is one of this library, which has advice already, and no replicated input explains
        it.
    """
    shards = [each for each in inputs if each.full is not None and each.full != each.local]
    lengths = set(tracker.lengths.values())
    lengths |= {full for each in shards for full, local in zip(each.full or (), each.local) if full != local}
    replicated = [
        each
        for each in inputs
        if each.full == each.local and (lengths & set(each.local) or any(_like(each, shard) for shard in shards))
    ]
    names = ", ".join(each.name for each in replicated)
    wrong = [each for each in shards if not any(part in lengths for part in _cut_lengths(each))]
    if isinstance(raised, AttentionProviderError) and not (replicated and shards):
        return ""
    if not name and not before:
        return (
            "hint: the model's own code combines its inputs before any module ends. Are they split alike (sequence, "
            "balanced), and does the code treat each token by itself? If not, split after that code."
        )
    if not name:
        return (
            f"hint: after '{before}', the last module before, the model's own code needs all tokens: gather there, "
            f'"{before}": CPOutput(...)'
            + (", or split what its output is combined with." if raised is not None else ".")
        )
    if routed is False and raised is None and shards:
        return (
            "hint: none of its attention went through a provider, so it attended only to this rank's tokens. Set its "
            "processor (set_attention_provider), or make it call attention_dispatch."
        )
    if replicated and shards and any("mask" in each.name for each in replicated):
        return f"hint: {names} {_is(replicated)} replicated, but other inputs are split. Split the mask as its tokens."
    if replicated and shards:
        return (
            f"hint: {names} {_is(replicated)} replicated, but {', '.join(each.name for each in shards)} "
            f"{_is(shards)} split. Split {_it(replicated)} too, with a CPInput for the argument or for the output of "
            f"the module that makes {_it(replicated)}."
        )
    if wrong or (raised is not None and shards and not replicated):
        given = ", ".join(each.name for each in wrong or shards)
        return (
            f"hint: is {given} split along the dimension of its tokens? See split_dim and expected_dims of its CPInput."
        )
    if any(part in cls for part in MIXES):
        return (
            "hint: it computes something over all tokens (a statistic, a convolution, a pooling), but this rank has "
            "only its shard. Split after it, or gather before it."
        )
    if routed:
        return (
            "hint: its attention was computed over all ranks. Check the plan's CPAttention: the sequences of queries "
            "and keys, their order, and its masks."
        )
    return (
        "hint: it mixes tokens, but this rank has only its shard: attention that calls no provider, a statistic, or "
        "positions that it counts itself. Split after it, gather before it, or give it the length with "
        "advanced.CPLength."
    )


def _like(argument: Argument, shard: Argument) -> bool:
    """Whether a replicated tensor has the full shape of a split one, except in the split dimension."""
    full = shard.full or ()
    return len(argument.local) == len(full) and all(
        one == other for one, other, local in zip(argument.local, full, shard.local) if other == local
    )


def _cut_lengths(argument: Argument) -> list[int]:
    return [full for full, local in zip(argument.full or (), argument.local) if full != local]


def _is(arguments: list[Argument]) -> str:
    return "is" if len(arguments) == 1 else "are"


def _it(arguments: list[Argument]) -> str:
    return "it" if len(arguments) == 1 else "them"
