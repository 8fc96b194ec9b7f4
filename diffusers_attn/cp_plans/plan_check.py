"""Finds sequence names in a plan that no entry splits, such as mistyped ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import AttentionProviderError
from . import advanced
from .plan import CPAttention, CPInput, Plan, entries


def check_sequences(plan: Plan) -> None:
    """Raises AttentionProviderError if a plan mentions a sequence name that no entry splits."""
    split: set[str] = set()
    mentioned: list[tuple[str, str, Any]] = []
    for path, spec in entries(plan):
        for word in _words(spec):
            names = _sequences(word)
            if _sets_length(word):
                split.update(names)
            mentioned += [(path, name, word) for name in names]
    for path, name, word in mentioned:
        if name not in split:
            close = difflib.get_close_matches(name, sorted(split), 1)
            raise AttentionProviderError(
                f"the plan mentions a sequence {name!r} for '{path}', in {word}, but no CPInput splits one with this "
                "name. "
                + (f"Did you mean {close[0]!r}? " if close else "")
                + f"Named sequences that it splits: {', '.join(map(repr, sorted(split))) or 'none'}."
            )


def _sets_length(word: Any) -> bool:
    """Whether a word makes a sequence's length known, so that other words may mention it."""
    if isinstance(word, CPInput):
        return not (word.flattened or word.grouped)
    return isinstance(word, advanced.CPLength)


def _words(spec: Any) -> Iterator[Any]:
    """Yields all words in one entry, however they are nested."""
    if isinstance(spec, Mapping):
        for each in spec.values():
            yield from _words(each)
    elif isinstance(spec, (list, tuple)):
        for each in spec:
            yield from _words(each)
    elif spec is not None:
        yield spec


def _sequences(word: Any) -> tuple[str, ...]:
    """The sequence names in a word. `CPAttention.prefix` is left out, because it may also name a cache."""
    if isinstance(word, CPAttention):
        return word.query + (word.key or ())
    named = getattr(word, "sequence", None)
    return () if named is None else (named,) if isinstance(named, str) else tuple(named)
