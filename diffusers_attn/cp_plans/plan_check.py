"""SequenceTracker that a plan mentions and nothing splits: a name that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import AttentionProviderError
from .plan import CPAttention, CPInput, CPLength, Plan, entries


def check_sequences(plan: Plan) -> None:
    """Raises AttentionProviderError where a plan mentions a sequence by a name that nothing splits."""
    split: set[str] = set()
    mentioned: list[tuple[str, str, Any]] = []
    for path, spec in entries(plan):
        for word in _words(spec):
            names = _tracker(word)
            makes = isinstance(word, CPLength) or (isinstance(word, CPInput) and not (word.flattened or word.grouped))
            if makes:
                split.update(names)
            mentioned += [(path, name, word) for name in names]
    for path, name, word in mentioned:
        if name not in split:
            close = difflib.get_close_matches(name, sorted(split), 1)
            raise AttentionProviderError(
                f"the plan mentions a sequence {name!r} for '{path}', in {word}, and no CPInput splits one of that "
                f"name. "
                + (f"Did you mean {close[0]!r}? " if close else "")
                + f"SequenceTracker that it splits: {', '.join(map(repr, sorted(split))) or 'none that has a name'}."
            )


def _words(spec: Any) -> Iterator[Any]:
    """All words in one entry, however they are nested."""
    if isinstance(spec, Mapping):
        for each in spec.values():
            yield from _words(each)
    elif isinstance(spec, (list, tuple)):
        for each in spec:
            yield from _words(each)
    elif spec is not None:
        yield spec


def _tracker(word: Any) -> tuple[str, ...]:
    """The sequences that a word mentions by name. What comes before keys (`prefix`) may also be a cache."""
    if isinstance(word, CPAttention):
        return word.query + (word.key or ())
    named = getattr(word, "sequence", None)
    return () if named is None else (named,) if isinstance(named, str) else tuple(named)
