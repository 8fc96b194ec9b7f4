"""The table of plan words: which hook serves which word.

To add a word, write its class in `cp_plans` and its hook in a file of `hooks/words`, and give it a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from ...cp_plans import advanced, plan
from ...errors import AttentionProviderError
from .words import attention, conditions, gather, halo, heads, length, split, store
from .words.base import ArgumentHook, MakeHooks

T = TypeVar("T")

ARGUMENTS: dict[type, type[ArgumentHook]] = {
    plan.CPInput: split.SplitTensor,
    advanced.CPGatherInput: gather.GatherTensor,
    advanced.CPStore: store.ReplaceStore,
    advanced.CPCache: conditions.Unchanged,
    advanced.CPLength: length.ChangeLength,
    advanced.CPLogBase: length.ChangeLogBase,
    advanced.CPBlocks: conditions.KeepBlocks,
    advanced.CPForbidden: conditions.Forbidden,
    advanced.CPRequired: conditions.Required,
}
"""Words that stand for one argument or output of a module: `{"blocks.0": {"hidden_states": WORD}}`."""


class EntryWord(NamedTuple):
    """A word that stands for a module."""

    hooks: MakeHooks
    attends: bool = False
    """Whether its module computes attention."""


ENTRIES: dict[type, EntryWord] = {
    plan.CPOutput: EntryWord(gather.hooks),
    advanced.CPHalo: EntryWord(halo.hooks),
    advanced.CPHeads: EntryWord(heads.hooks, attends=True),
    plan.CPAttention: EntryWord(attention.hooks, attends=True),
    type(None): EntryWord(attention.hooks_without_role),
}
"""Words that stand for a module: `{"blocks.*.attn": WORD}`."""


def find(table: Mapping[type, T], word: object) -> T | None:
    """The line of `table` for a word, which may be of a subclass; None if there is none."""
    return next((table[cls] for cls in type(word).__mro__ if cls in table), None)


def attends(spec: object) -> bool:
    """Whether an entry of a plan is for a module that computes attention."""
    entry = find(ENTRIES, spec)
    return entry is not None and entry.attends


def words_in(spec: Any) -> list[Any]:
    """All words in a nested spec. In a list, None leaves an element unchanged."""
    if isinstance(spec, (list, tuple)):
        return [word for each in spec if each is not None for word in words_in(each)]
    return [word for each in spec.values() for word in words_in(each)] if isinstance(spec, Mapping) else [spec]


def not_understood(path: str, spec: object) -> AttentionProviderError:
    """The error for an entry that is not made of these words."""
    words = words_in(spec) if isinstance(spec, (list, tuple, Mapping)) else [spec]
    if any(type(word).__module__.startswith("diffusers.") for word in words):
        return AttentionProviderError(
            f"the plan has {spec!r} for '{path}', which is in the words of diffusers. Here ContextParallelInput is "
            "CPInput, and ContextParallelOutput is CPOutput, with the same arguments: import them from diffusers_attn."
        )
    others = [word.__name__ for word in ENTRIES if word not in (plan.CPOutput, type(None))]
    return AttentionProviderError(
        f"the plan has {spec!r} for '{path}'. Accepted are a dict of ParamId to "
        f"{', '.join(word.__name__ for word in ARGUMENTS)} (or, for nested arguments, lists and dicts of them), a "
        f"CPOutput or a list of them, {', '.join(f'a {name}' for name in others)}, and a list of these."
    )
