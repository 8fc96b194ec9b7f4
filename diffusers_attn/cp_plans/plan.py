"""The plan words that every model needs, and the type of a plan. `cp_plans.advanced` has the other words.

A plan maps the names of submodules to what happens there:

    {
        "rope": {ParamId(index=0): CPInput(1, 4, split_output=True)},      # splits an output, after the module
        "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},  # splits an argument, before every block
        "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},          # splits an argument, before one block
        "blocks.*.attn": CPAttention(("image",)),                          # names the sequence that attends
        "proj_out": [CPOutput(1, 3)],                                      # gathers the output, after the module
    }

Names are those of `named_modules`, with these additions: "" is the model itself; `*` stands for every entry of a
ModuleList; negative numbers count from the end of one; a name that ends in a question mark, "blocks.*.attn2?", may be
missing from a model or from some blocks.

Plans are data. This module imports nothing of the library except the other words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from .advanced import (
    CPBlocks,
    CPCache,
    CPForbidden,
    CPGatherInput,
    CPHalo,
    CPHeads,
    CPLength,
    CPLogBase,
    CPRequired,
    CPStore,
)


@dataclasses.dataclass(frozen=True)
class ParamId:
    """An argument of a module's forward or, with `CPInput(split_output=True)`, one of the module's outputs.

    Raises:
        ValueError: neither a name nor an index is given.
    """

    name: str | None = None
    """Name of the argument, or key of the output."""
    index: int | None = None
    """Position of the argument, not counting self, or of the output. If both are given, the name decides where the
    module has an argument of that name."""

    def __post_init__(self) -> None:
        if self.name is None and self.index is None:
            raise ValueError(
                'ParamId() names nothing: give a name, ParamId("hidden_states"), or an index, ParamId(index=0).'
            )

    def __str__(self) -> str:
        return repr(self.name) if self.name is not None else f"number {self.index}"


@dataclasses.dataclass(frozen=True)
class CPInput:
    """A tensor that is the same on all ranks. Each rank keeps its shard of it. For a tuple, list or dict, this applies
    to every tensor in it.

    Raises:
        ValueError: `balanced` without a sequence name.
    """

    split_dim: int
    """Dimension to split. A negative number counts from the last dimension."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have. Default: any."""
    split_output: bool = False
    """Whether to split an output of the module instead of an argument."""
    sequence: str | tuple[str, ...] | None = None
    """Name of the sequence, for plans that split several. Default: a name made of the module and the argument.

    A named sequence may have fewer tokens than there are ranks. A rank without a token receives the first token as a
    placeholder, which attention and gathering leave out. For an unnamed sequence, this case is an error.

    Several names stand for sequences that the model has joined in this order. Each is split separately. The first
    one without a known length (or the first, if all are known) has the tokens that the other lengths leave."""
    leave_other_dims: bool = False
    """Whether the argument may hold one value for all tokens, as a timestep may. A tensor whose number of dimensions
    is not `expected_dims`, or whose `split_dim` has a single entry, is then not split."""
    split_already: tuple[str, ...] = ()
    """Names in `sequence` whose tokens are split in the tensor already, because the model made it after the split."""
    flattened: bool = False
    """Whether `split_dim` joins batch and sequence: all tokens of the first sample, then of the second, and so on. This
    is so where a model attends over frames at every pixel. Accepts a single sequence, which has been split
    earlier in the forward."""
    grouped: bool = False
    """Whether every entry of the sequence is several consecutive tokens, such as the pixels of a row. Accepts a single
    sequence, which has been split earlier in the forward and has at least as many entries as there are ranks."""
    balanced: bool = False
    """Whether each rank's shard is one part from the front of the sequence and one from its back, instead of one part.
    With causal attention, late tokens attend to more keys than early ones, and this gives all ranks the same work. It
    applies to every tensor of the sequence, which needs a name."""

    def __post_init__(self) -> None:
        if self.balanced and self.sequence is None:
            raise ValueError('CPInput(balanced=True) needs the name of its sequence: CPInput(..., sequence="text").')


@dataclasses.dataclass(frozen=True)
class CPOutput:
    """A split output of a module. It is gathered, so that every rank has all of it."""

    gather_dim: int
    """Dimension of the sequence. A negative number counts from the last dimension."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have. Default: any."""
    sequence: str | tuple[str, ...] | None = None
    """Name of the sequence, or the names of several joined sequences in their order. Default: found by length. Needed
    where several sequences fit."""
    grouped: bool = False
    """Whether every entry of the sequence is several consecutive tokens, such as the pixels of a row. Accepts a single
    sequence, which has been split earlier in the forward and has at least as many entries as there are ranks."""


@dataclasses.dataclass(frozen=True)
class CPAttention:
    """The sequences of an attention module's queries and keys, in the order in which the module joins them.

    Needed where lengths are ambiguous, as when a sequence has fewer tokens than there are ranks, and where a mask or
    causal attention needs the order of joined sequences.
    """

    query: tuple[str, ...]
    """Names of the sequences of the queries."""
    key: tuple[str, ...] | None = None
    """Names of the sequences of the keys. Default: those of the queries. `()` means that every rank has all keys, so
    that attention is local. `query=(), key=()` means that every rank has all queries too."""
    prefix: str | None = None
    """Name of keys that come before those of `key` and that every rank has in full: a sequence, or a cache if no
    sequence of this name is split. Such a sequence stays replicated wherever the plan names it, and calls among its own
    tokens are local. Only its keys in a longer call are split, and its part of a gathered tensor."""
    outer_mask: bool = False
    """Whether the mask that reaches attention is an outer product of one value per token, computed in the block. Values
    are bool, or zeros and ones."""
    key_mask: bool = False
    """Whether the mask that reaches attention has one value for each key of the full sequence, on every rank, the same
    for all heads and queries. Padding behind the last key is cut off."""
    row_mask: bool = False
    """Whether the mask that reaches attention has one row for each query of this rank and one column for each key of
    the full sequence, the same for all heads. Padding behind the last key is cut off."""
    bound: bool = False
    """Whether diffusers' own processor depends on positions in the full sequence. Then the module must be bound to a
    provider, for which this library has a processor of its own, before the model is split."""


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
"""Nested like the argument: a list for the elements of a tuple or list (None leaves an element unchanged), and a dict
for a dict, whose missing keys are ignored."""

InputPlan = Mapping[ParamId | str | int, InputSpec]
OutputPlan = CPOutput | Sequence[CPOutput | None]
Entry = InputPlan | OutputPlan | CPHalo | CPHeads | CPAttention
_One = InputPlan | CPOutput | CPHalo | CPHeads | CPAttention
_NO_OUTPUTS = (Mapping, CPHalo, CPHeads, CPAttention)
Plan = Mapping[str, _One | Sequence[_One | None]]
"""Entries by module name. A list that contains anything but outputs holds several entries for one module."""
PlanOfModel = Callable[[Any], Plan]
"""Returns the plan for a model. It may be registered in place of a plan, for a class whose configuration decides what
to split."""


def entries(plan: Plan) -> Iterator[tuple[str, Entry]]:
    """Yields the entries of a plan one by one, with their module names. A name may repeat."""
    for path, spec in plan.items():
        if isinstance(spec, Sequence) and any(isinstance(each, _NO_OUTPUTS) for each in spec):
            yield from ((path, each) for each in spec if each is not None)
        else:
            yield path, cast(Entry, spec)
