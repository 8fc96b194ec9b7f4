"""The hooks of one entry of a plan, on one of the modules that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...cp_plans.plan import CPOutput
from ..sequences.tracker import SequenceTracker
from . import arguments
from .plan_words import ENTRIES, find, not_understood
from .words import gather
from .words.base import Place, SetHook


def hooks_of(
    module: nn.Module, path: str, spec: Any, tracker: SequenceTracker, name: str | None = None
) -> Iterable[SetHook]:
    """Functions that set the hooks of one entry of a plan.

    Args:
        module: a module that the entry names.
        path: the entry's name, which may stand for several modules.
        spec: the entry: a word, a list of CPOutput, or a dict of arguments. None for an attention module that the plan
            does not name.
        name: the module's own name, if `path` stands for several.

    Raises:
        AttentionProviderError: the entry does not fit the module, or is none.
    """
    place = Place(module, path, path if name is None else name, tracker)
    if isinstance(spec, Mapping):
        return arguments.hooks(place, spec)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not all(each is None or isinstance(each, CPOutput) for each in spec):
            raise not_understood(path, spec)
        return gather.hooks(place, spec)
    entry = find(ENTRIES, spec)
    if entry is None:
        raise not_understood(path, spec)
    return entry.hooks(place, spec)
