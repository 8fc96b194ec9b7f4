"""Each entry of a plan as one or more lines of English."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...context_parallel.hooks.find_argument import as_param
from ...cp_plans import advanced
from ...cp_plans.plan import CPAttention, CPInput, CPOutput, Plan, entries


@dataclasses.dataclass(frozen=True)
class Line:
    """What a plan does at one place of a module."""

    place: str
    """"argument", "output" or "module"."""
    name: str
    """Name or number of the argument or output; "" for the module."""
    word: str
    """The plan word, such as "CPInput"."""
    text: str


def lines_of(spec: Any) -> Iterator[Line]:
    """The lines of one entry."""
    if isinstance(spec, Mapping):
        for key, each in spec.items():
            param = as_param(key)
            name = param.name if param.name is not None else str(param.index)
            yield from _argument(name, each)
    elif isinstance(spec, CPOutput):
        yield _line("output", "0", spec)
    elif isinstance(spec, Sequence):
        yield from (_line("output", str(i), each) for i, each in enumerate(spec) if each is not None)
    else:
        yield _line("module", "", spec)


def sequences_of(plan: Plan) -> list[str]:
    """Names of the sequences in a plan, in their order."""
    found: dict[str, None] = {}
    for _, spec in entries(plan):
        for word in _words(spec):
            for name in _names(getattr(word, "sequence", None)) + (
                list(word.query) + list(word.key or ()) if isinstance(word, CPAttention) else []
            ):
                found[name] = None
    return list(found)


def _argument(name: str, spec: Any) -> Iterator[Line]:
    if isinstance(spec, Mapping):
        for key, each in spec.items():
            yield from _argument(f"{name}.{key}", each)
    elif isinstance(spec, Sequence):
        for i, each in enumerate(spec):
            yield from _argument(f"{name}[{i}]", each) if each is not None else ()
    else:
        output = isinstance(spec, CPInput) and spec.split_output
        yield _line("output" if output else "argument", name, spec)


def _words(spec: Any) -> Iterator[Any]:
    if isinstance(spec, Mapping):
        for each in spec.values():
            yield from _words(each)
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        for each in spec:
            yield from _words(each)
    elif spec is not None:
        yield spec


def _line(place: str, name: str, word: Any) -> Line:
    return Line(place, name, type(word).__name__, TEXTS[type(word)](word))


def _names(sequence: str | Sequence[str] | None) -> list[str]:
    return [] if sequence is None else [sequence] if isinstance(sequence, str) else list(sequence)


def _joined(sequence: str | Sequence[str] | None) -> str:
    names = _names(sequence)
    return " + ".join(names) if names else "the sequence of this length"


def _input(word: CPInput) -> str:
    more = "; left as it is where it has one value for all tokens" if word.leave_other_dims else ""
    more += "; the dimension joins batch and sequence" if word.flattened else ""
    more += "; each entry is several tokens" if word.grouped else ""
    more += "; each rank has a part from the front and one from the back" if word.balanced else ""
    sequence = f" ({_joined(word.sequence)})" if word.sequence else ""
    return f"split along dimension {word.split_dim}{sequence}{more}"


def _output(word: CPOutput | advanced.CPGatherInput) -> str:
    sequence = f" ({_joined(word.sequence)})" if word.sequence else ""
    return f"gathered along dimension {word.gather_dim}{sequence}"


def _attention(word: CPAttention) -> str:
    query = _joined(word.query)
    if not word.query:
        text = "attention on complete tokens, the same on every rank"
    elif word.key is None or word.key == word.query:
        text = f"attention over {query}, across ranks"
    elif word.key:
        text = f"attention of {query} to {_joined(word.key)}, across ranks"
    else:
        text = f"attention of {query} to keys that every rank has in full: local"
    text += f"; keys of {word.prefix} come first, and every rank has them" if word.prefix else ""
    for present, mask in (
        (word.outer_mask, "an outer product of one value per token"),
        (word.key_mask, "one value per key"),
        (word.row_mask, "one row per query of this rank"),
    ):
        text += f"; its mask has {mask}" if present else ""
    return text + ("; needs a provider that is bound to the model" if word.bound else "")


def _length(word: advanced.CPLength) -> str:
    if word.full:
        return f"length of a shard of {word.sequence}: replaced by that of the full sequence"
    if word.of is not None:
        return f"gives the length of {word.sequence}"
    return f"length of {word.sequence}: replaced by that of this rank's shard"


TEXTS: dict[type, Callable[[Any], str]] = {
    CPInput: _input,
    CPOutput: _output,
    CPAttention: _attention,
    advanced.CPGatherInput: _output,
    advanced.CPLength: _length,
    advanced.CPHalo: lambda word: (
        f"{word.reach} entries of {word.sequence} of the neighbouring ranks are added at either side, and cut off "
        "the output"
    ),
    advanced.CPHeads: lambda word: (
        f"ranks exchange tokens of {word.sequence} for heads (of {word.heads}) before the module, and back after it"
    ),
    advanced.CPStore: lambda word: f"gathered before {word.method}() keeps it ({_joined(word.sequence)})",
    advanced.CPCache: lambda word: "each rank keeps its own",
    advanced.CPLogBase: lambda word: f"base of a logarithm: rescaled to the length of this rank's {word.sequence}",
    advanced.CPBlocks: lambda word: f"where given, {word.sequence} is split between blocks of {word.size} tokens",
    advanced.CPForbidden: lambda word: f"must be left out: {word.reason}",
    advanced.CPRequired: lambda word: f"must be given: {word.reason}",
}
"""By plan word."""
