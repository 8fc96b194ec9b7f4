"""Plan words that few models need, on top of `CPInput`, `CPOutput` and `CPAttention`.

    from diffusers_attn.cp_plans import advanced

    {"conv": advanced.CPHalo(2, 1, sequence="rows")}

The words are data. This module imports nothing of the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class CPLength:
    """An argument that is the length of a sequence. The module receives the length of this rank's shard instead.

    Raises:
        ValueError: both `of` and `full` are set.
    """

    sequence: str
    """Name of the sequence."""
    of: Callable[[Any], int] | None = None
    """Computes the sequence's length from an argument that is not a number. The module receives the argument
    unchanged. Default: the argument is the length."""
    full: bool = False
    """Whether to convert in the other direction: the argument is the length of this rank's shard, and the module
    receives the length of the full sequence. For modules that receive gathered tokens."""

    def __post_init__(self) -> None:
        if self.full and self.of is not None:
            raise ValueError("CPLength(of=..., full=True): set one of them. Each excludes the other.")


@dataclasses.dataclass(frozen=True)
class CPGatherInput:
    """A split argument that the module needs in full, as where experts choose among all tokens. It is gathered before
    the module runs. `CPInput(split_output=True)` splits an output of the module again.

    Every rank then computes the whole module, so that it is no faster than on one device.
    """

    gather_dim: int
    """Dimension of the sequence. A negative number counts from the last dimension."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have. Default: any."""
    sequence: str | tuple[str, ...] | None = None
    """Name of the sequence, or the names of several joined sequences in their order. Default: found by length."""
    grouped: bool = False
    """Whether every entry of the sequence is several consecutive tokens, as for `CPOutput`."""


@dataclasses.dataclass(frozen=True)
class CPHalo:
    """A module whose output at a token depends on the tokens beside it, as a convolution's does. Its first argument is
    extended by the adjacent tokens of other ranks. The extra tokens are cut off the output, which must be as long as
    the input."""

    dim: int
    """Dimension of the sequence in the first argument and in the output."""
    reach: int
    """Number of entries of the sequence that the module reads on either side."""
    sequence: str
    """Name of the sequence. A tensor split earlier in the forward sets its length."""
    grouped: bool = False
    """Whether every entry of the sequence is several consecutive tokens, as for `CPOutput`."""
    length: str | None = None
    """Name of the argument that holds the number of entries. The module receives the number including the halo.
    Default: the module has no such argument."""


@dataclasses.dataclass(frozen=True)
class CPHeads:
    """A module that computes each head separately over the full sequence without calling attention, as a recurrence
    over frames does. Before the module, ranks exchange tokens for heads: each receives all tokens of some heads. After
    it they exchange back. Neither the tokens nor the heads need to divide evenly.

    A tensor split earlier in the forward sets the sequence's length, which must be at least the number of ranks.
    Arguments without heads must be complete on every rank: gather them with `CPGatherInput` and `CPLength(full=True)`.
    """

    sequence: str
    """Name of the sequence."""
    heads: int
    """Number of heads on one device."""
    arguments: Mapping[str, tuple[int, int]]
    """Arguments with heads, by name, as (dimension of the sequence, dimension of the heads). Dimension 0 is the batch.
    Either dimension may hold several consecutive numbers per entry, such as the pixels of a frame or the channels of a
    head."""
    output: tuple[int, int]
    """The output's (dimension of the sequence, dimension of the heads)."""


@dataclasses.dataclass(frozen=True)
class CPStore:
    """An object in which a module keeps keys and values for later forwards. They are gathered before they are stored,
    so that every rank stores all of them. `CPAttention(prefix=...)` marks the later calls that read them."""

    method: str
    """Name of the method that stores tensors. The module passes them by position."""
    gather_dim: int
    """Dimension of the sequence in the tensors."""
    sequence: str | tuple[str, ...]
    """Name of the sequence, or the names of several joined sequences in their order."""


@dataclasses.dataclass(frozen=True)
class CPCache:
    """An argument of the model itself, "", into which the model writes tensors for later forwards. Each rank keeps its
    own object. It is not compared between ranks, and no rank's object replaces another's."""


@dataclasses.dataclass(frozen=True)
class CPLogBase:
    """The base of a logarithm of the sequence length by which a module scales its scores. The module receives the base
    for which the local length gives the same logarithm as the full length does for the original base."""

    sequence: str
    """Name of the sequence."""


@dataclasses.dataclass(frozen=True)
class CPBlocks:
    """An argument that makes the model choose, while it runs, which blocks of a sequence attend to each other. Where
    the argument is given, the sequence is split between blocks, never within one. The argument itself is unchanged.

    Put the word on a module that runs before the sequence is split, such as the model itself, "".

    Raises:
        ValueError: the size is below one.
    """

    sequence: str
    """Name of the sequence."""
    size: int
    """Block size in tokens. The sequence's length must be a multiple of it, with at least one block for every rank."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"CPBlocks(size={self.size}): a number of tokens is accepted, from 1.")


@dataclasses.dataclass(frozen=True)
class CPForbidden:
    """An argument that must be None or left out, because no plan can split what the model does with it. Any other value
    raises AttentionProviderError before the forward starts."""

    reason: str
    """What the argument does and what to do instead. It is quoted in the error."""


@dataclasses.dataclass(frozen=True)
class CPRequired:
    """An argument that must be given, because the plan does not cover the forward without it. Leaving it out raises
    AttentionProviderError before the forward starts."""

    reason: str
    """What the model does without the argument and what to do instead. It is quoted in the error."""
