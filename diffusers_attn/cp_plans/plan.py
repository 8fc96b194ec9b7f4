"""The words that a context-parallel plan is written in.

A plan maps names of submodules to what happens there:

    {
        "rope": {ParamId(index=0): CPInput(1, 4, split_output=True)},          # an output is split after the module
        "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},      # an input before it, of every block
        "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
        "proj_out": [CPOutput(1, 3)],                                          # its output is gathered
    }

Names are those of `named_modules`, "" the model itself, `*` every entry of a ModuleList, and negative numbers count
from its end. A name with a question mark, "blocks.*.attn2?", is of a module that only some models, or some blocks,
have. No imports here: plans are data, and anyone may read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast


@dataclasses.dataclass(frozen=True)
class ParamId:
    """An argument of a module's forward, or with `split_output` one of its outputs.

    Raises:
        ValueError: neither name nor index.
    """

    name: str | None = None
    """of the argument; of an output, its key."""
    index: int | None = None
    """of the argument, without self; of an output, its place. Where both are given the name decides, if there is such
    an argument."""

    def __post_init__(self) -> None:
        if self.name is None and self.index is None:
            raise ValueError(
                'ParamId() names nothing: give a name, ParamId("hidden_states"), or an index, ParamId(index=0).'
            )

    def __str__(self) -> str:
        return repr(self.name) if self.name is not None else f"number {self.index}"


@dataclasses.dataclass(frozen=True)
class CPInput:
    """A tensor that all ranks have alike and of which each keeps its shard. For a tuple, list or dict, all its
    tensors."""

    split_dim: int
    """negative counts from the last."""
    expected_dims: int | None = None
    """how many dimensions it must have."""
    split_output: bool = False
    """an output of the module, rather than an input."""
    sequence: str | tuple[str, ...] | None = None
    """a name for the sequence, where a plan splits several. A sequence that has a name may have fewer tokens than there
    are ranks: a rank without one is given the first token to stand in, which attention and gathering leave out. One
    without a name is refused then. Several names: sequences that the model has joined to one,
    in this order, of which each is split on its own. One of them, the one that was not split before or else the first,
    is as long as the others leave."""
    leave_other_dims: bool = False
    """whether one value may stand for all tokens, as a time does: a tensor with other than `expected_dims` dimensions,
    or with a single entry in `split_dim`, is left whole."""
    split_already: tuple[str, ...] = ()
    """those of `sequence` of which the tensor holds this rank's tokens alone, since the model made it after they were
    split."""
    flattened: bool = False
    """whether `split_dim` is a batch and the sequence in one: the tokens of one sample after those of another, as where
    a model attends from frame to frame at every place. The sequence, a single one, is split before elsewhere."""
    grouped: bool = False
    """whether every entry of the sequence is several tokens, one after the other, as the pixels of a row are. The
    sequence, a single one of at least as many entries as there are ranks, has its length from before."""
    balanced: bool = False
    """whether each rank has a part from the front of this stream and one from its back, rather than one part. Where
    attention is causal, late tokens see more than early ones, and all ranks then have the same work. It holds for all
    that is split of this stream, which needs a name.

    Raises:
        ValueError: it has none.
    """

    def __post_init__(self) -> None:
        if self.balanced and self.sequence is None:
            raise ValueError('CPInput(balanced=True) is said of a sequence: name it, CPInput(..., sequence="text").')


@dataclasses.dataclass(frozen=True)
class CPGatherInput:
    """An argument of which every rank has its shard and which its module needs whole, as where experts choose among all
    tokens: it is gathered before the module. What comes out for all tokens is split again with
    `CPInput(split_output=True)`. All ranks then compute all of the module, so that it is no faster than on one."""

    gather_dim: int
    expected_dims: int | None = None
    """how many dimensions it must have."""
    sequence: str | tuple[str, ...] | None = None
    """which sequence it is, or several, joined; needed only where lengths do not tell."""
    grouped: bool = False
    """whether every entry of the sequence is several tokens, as for `CPOutput`."""


@dataclasses.dataclass(frozen=True)
class CPStore:
    """An object in which a module keeps keys and values for later forwards. What it stores is gathered before, so that
    every rank has all of it; `CPAttention(prefix=...)` says of later calls that such keys come first."""

    method: str
    """by which the module stores tensors, given by position."""
    gather_dim: int
    sequence: str | tuple[str, ...]
    """which sequence they are, or several, joined."""


@dataclasses.dataclass(frozen=True)
class CPCache:
    """An argument of the model, "", that holds tensors from one forward for later ones, into which the model writes:
    each rank's stay its own, neither compared with the other ranks' nor replaced by them."""


@dataclasses.dataclass(frozen=True)
class CPLength:
    """A number that is the length of a sequence: its module is given the length of this rank's shard.

    Raises:
        ValueError: `of` together with `whole`.
    """

    sequence: str
    of: Callable[[Any], int] | None = None
    """where the argument is no such number, but tells it: a function of it that gives the sequence's length. The module
    is given the argument as it is."""
    whole: bool = False
    """the other way: the number is the length of this rank's shard, and the module, which is given the whole of the
    sequence, is given its length."""

    def __post_init__(self) -> None:
        if self.whole and self.of is not None:
            raise ValueError("CPLength(of=..., whole=True): one of them is accepted, as either tells the other.")


@dataclasses.dataclass(frozen=True)
class CPLogBase:
    """The base of a logarithm that a module takes of the length of its sequence, for the scale of its scores: it is
    given the base to which the length of this rank's shard has the logarithm that the length of the whole has."""

    sequence: str


@dataclasses.dataclass(frozen=True)
class CPBlocks:
    """An argument with which a model attends by blocks of so many tokens of a sequence, chosen while it runs: where it
    is given, the sequence is split between blocks and never within one. The argument itself is left as it is. It
    belongs to a module that runs before the sequence is split, as the model itself, "".

    Raises:
        ValueError: a size below one.
    """

    sequence: str
    size: int
    """how many tokens a block has. The sequence's length must be a multiple, of at least as many blocks as ranks."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"CPBlocks(size={self.size}): a number of tokens is accepted, from 1.")


@dataclasses.dataclass(frozen=True)
class CPForbidden:
    """An argument that must be None or left out, because with it the model does what no plan of this kind can split.

    Given anything else, the forward is refused before it begins.
    """

    reason: str
    """what it does and what to do instead, as it stands in the error."""


@dataclasses.dataclass(frozen=True)
class CPRequired:
    """An argument that must be given, because without it the model does what its plan does not say.

    Without it, the forward is refused before it begins.
    """

    reason: str
    """what it does then and what to do instead, as it stands in the error."""


@dataclasses.dataclass(frozen=True)
class CPOutput:
    """A tensor of which every rank has its shard and which all then have whole."""

    gather_dim: int
    expected_dims: int | None = None
    """how many dimensions it must have."""
    sequence: str | tuple[str, ...] | None = None
    """which sequence it is, or several, joined; needed only where lengths do not tell."""
    grouped: bool = False
    """whether every entry of the sequence is several tokens, one after the other, as the pixels of a row are. The
    sequence, a single one of at least as many entries as there are ranks, has its length from before."""


@dataclasses.dataclass(frozen=True)
class CPHalo:
    """A module that looks at halo in a sequence, as a convolution does: its first argument is given with those of
    the ranks before and after, and of what comes out, which is as long, those are cut off."""

    dim: int
    reach: int
    """how far it looks, to either side."""
    sequence: str
    grouped: bool = False
    """whether every entry of the sequence is several tokens, as for `CPOutput`."""
    length: str | None = None
    """the argument, if there is one, that says how many entries there are: it is given the halo among them."""


@dataclasses.dataclass(frozen=True)
class CPHeads:
    """A module that computes every head by itself from the whole sequence, and not by calling attention, as a
    recurrence over frames does. Before it, ranks exchange all heads of some tokens for all tokens of some heads, and
    behind it back, so that every one has the work of its heads. Neither need divide.

    The sequence has its length from before, of at least as many entries as there are ranks. Arguments without heads are
    given to the module whole, with `CPGatherInput` and `CPLength(whole=True)` where they are not.
    """

    sequence: str
    heads: int
    """how many there are on one device."""
    arguments: Mapping[str, tuple[int, int]]
    """of each argument with heads, by name, the dimensions of the sequence and of the heads; the batch is the first.
    Either may have several numbers for every entry, one after the other: pixels of a frame, channels of a head."""
    output: tuple[int, int]
    """the same of what comes out."""


@dataclasses.dataclass(frozen=True)
class CPAttention:
    """What the queries and keys of an attention module are: names of sequences, in the order in which they are joined.

    Needed where lengths do not tell, as when a sequence has fewer tokens than there are ranks, and where a mask or
    causality needs the order of joined sequences.
    """

    query: tuple[str, ...]
    key: tuple[str, ...] | None = None
    """None is as the query; () is keys that every rank has whole, so that attention to them is local. With
    `query=()`, queries and keys are."""
    prefix: str | None = None
    """keys that come before these and that every rank has whole: those of a sequence, or, where none of this name is
    split, of a cache. Such a sequence then stays whole wherever it is named, and a call among its tokens is local: what
    has to be split of it are its keys, and what is gathered."""
    outer_mask: bool = False
    """whether the mask that reaches attention is an outer product, made in the block from one value per token: bool, or
    ones and zeros."""
    key_mask: bool = False
    """whether the mask that reaches attention is one value per key, of all keys, whole on every rank: alike for all
    heads and queries. What a model pads it with behind them is cut off."""
    row_mask: bool = False
    """whether the mask that reaches attention is rows: of this rank's queries, over the keys of all ranks. They are the
    same for all heads; and what a model pads them with behind the keys, where it takes this rank's for all, is cut
    off."""
    bound: bool = False
    """whether diffusers' own processor counts places of the whole sequence, so that only one that is bound to a
    provider, for which this library has code of its own, can serve what is split."""


InputSpec = (
    CPInput
    | CPGatherInput
    | CPStore
    | CPCache
    | CPLength
    | CPLogBase
    | CPBlocks
    | CPForbidden
    | CPRequired
    | Sequence["InputSpec | None"]
    | Mapping[str, "InputSpec"]
)
"""Nested as the argument is: a list for a tuple's elements (None for one to leave), a dict for a dict's, of which those
that it has are split."""

InputPlan = Mapping[ParamId | str | int, InputSpec]
OutputPlan = CPOutput | Sequence[CPOutput | None]
Entry = InputPlan | OutputPlan | CPHalo | CPHeads | CPAttention
_One = InputPlan | CPOutput | CPHalo | CPHeads | CPAttention
_NO_OUTPUTS = (Mapping, CPHalo, CPHeads, CPAttention)
Plan = Mapping[str, _One | Sequence[_One | None]]
"""By name of the module. A list with anything but outputs in it is several entries for one module."""
PlanOfModel = Callable[[Any], Plan]
"""What may be registered in a plan's place for a class whose configuration decides what there is to split: a function
that is given the model and returns its plan."""


def entries(plan: Plan) -> Iterator[tuple[str, Entry]]:
    """What a plan says, one thing at a time: names of modules, which may come again, and what happens there."""
    for path, spec in plan.items():
        if isinstance(spec, Sequence) and any(isinstance(each, _NO_OUTPUTS) for each in spec):
            yield from ((path, each) for each in spec if each is not None)
        else:
            yield path, cast(Entry, spec)
