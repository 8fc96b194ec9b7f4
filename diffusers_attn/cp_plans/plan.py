"""The words that a context-parallel plan is written in.

A plan maps names of submodules to what happens there:

    {
        "rope": {ParamId(index=0): CPInput(1, 4, split_output=True)},          # an output is split after the module
        "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},      # an input before it, of every block
        "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
        "proj_out": [CPOutput(1, 3)],                                          # its output is gathered
    }

Names are those of `named_modules`, "" the model itself, `*` every entry of a ModuleList, and negative numbers count
from its end. No imports here: plans are data, and anyone may read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


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
    """A tensor that all ranks have alike and of which each keeps its shard. For a tuple or list, all its tensors."""

    split_dim: int
    """negative counts from the last."""
    expected_dims: int | None = None
    """how many dimensions it must have."""
    split_output: bool = False
    """an output of the module, rather than an input."""
    stream: str | tuple[str, ...] | None = None
    """a name for the sequence, where a plan splits several. Several names: sequences that the model has joined to one,
    in this order, of which each is split on its own. The first is as long as the others, split before, leave."""
    leave_other_dims: bool = False
    """whether one value may stand for all tokens, as a time does: a tensor with other than `expected_dims` dimensions,
    or with a single entry in `split_dim`, is left whole."""
    every_rank: bool = False
    """whether this stream's code does not run without a token. A rank that has none, of a sequence shorter than there
    are ranks, is then given the first one to stand in, which attention and gathering leave out. It holds for all that
    is split of this stream, which needs a name.

    Raises:
        ValueError: it has none.
    """

    def __post_init__(self) -> None:
        if self.every_rank and self.stream is None:
            raise ValueError('CPInput(every_rank=True) is said of a stream: name it, CPInput(..., stream="text").')


@dataclasses.dataclass(frozen=True)
class CPLength:
    """A number that is the length of a sequence: its module is given the length of this rank's shard."""

    stream: str


@dataclasses.dataclass(frozen=True)
class CPAbsent:
    """An argument that must be None or left out, because with it the model does what no plan of this kind can split.

    Given anything else, the forward is refused before it begins.
    """

    reason: str
    """what it does and what to do instead, as it stands in the error."""


@dataclasses.dataclass(frozen=True)
class CPOutput:
    """A tensor of which every rank has its shard and which all then have whole."""

    gather_dim: int
    expected_dims: int | None = None
    """how many dimensions it must have."""
    stream: str | tuple[str, ...] | None = None
    """which sequence it is, or several, joined; needed only where lengths do not tell."""


@dataclasses.dataclass(frozen=True)
class CPAttention:
    """What the queries and keys of an attention module are: names of streams, in the order in which they are joined.

    Needed where lengths do not tell, as when a stream has fewer tokens than there are ranks, and where a mask or
    causality needs the order of joined streams.
    """

    query: tuple[str, ...]
    key: tuple[str, ...] | None = None
    """None is as the query; () is keys that every rank has whole, so that attention to them is local. With
    `query=()`, queries and keys are."""
    outer_mask: bool = False
    """whether the mask that reaches attention is an outer product, made in the block from one value per token: bool, or
    ones and zeros."""
    row_mask: bool = False
    """whether the mask that reaches attention is rows: of this rank's queries, over the keys of all ranks. They are the
    same for all heads; and what a model pads them with behind the keys, where it takes this rank's for all, is cut
    off."""


InputSpec = CPInput | CPLength | CPAbsent | Sequence["InputSpec | None"] | Mapping[str, "InputSpec"]
"""Nested as the argument is: a list for a tuple's elements (None for one to leave), a dict for a dict's."""

InputPlan = Mapping[ParamId | str | int, InputSpec]
OutputPlan = CPOutput | Sequence[CPOutput | None]
Plan = Mapping[str, InputPlan | OutputPlan | CPAttention]
