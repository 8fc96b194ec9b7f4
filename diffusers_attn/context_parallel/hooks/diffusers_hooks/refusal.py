"""Refuses hooks that are not exact where a model is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ....cp_plans.plan import CPAttention, Plan, entries
from ....errors import AttentionProviderError
from ..find_argument import argument_of, as_param
from ..plan_words import ARGUMENTS, find, words_in
from .registry import class_name
from .rules import RULES

DECLARED = "exact_over_ranks"
"""Attribute by which a hook class outside diffusers declares that it is exact on a part of the tokens."""


class Split(NamedTuple):
    """Arguments and output of the model itself that a plan splits. Hooks on the model receive this rank's part."""

    arguments: frozenset[str]
    """Arguments of the model that are changed before its forward."""
    output: bool
    """Whether the model's output is gathered, or split, after its forward."""

    @staticmethod
    def of(model: nn.Module, plan: Plan) -> Split:
        """What `plan` splits of `model` itself."""
        arguments: set[str] = set()
        output = False
        for path, spec in entries(plan):
            if path or isinstance(spec, CPAttention):
                continue
            if not isinstance(spec, Mapping):
                output = True
                continue
            for key, nested in spec.items():
                param = as_param(key)
                words = [(find(ARGUMENTS, word), word) for word in words_in(nested)]
                changing = [(kind, word) for kind, word in words if kind is not None and kind.changes_value(word)]
                if any(kind.is_for_output(word) for kind, word in changing):
                    output = True
                elif changing:
                    name, index = argument_of(model, path, param)
                    arguments.add(name or f"argument {index}")
        return Split(frozenset(arguments), output)


def check_hook(model: nn.Module, split: Split, path: str, name: str, hook: Any) -> None:
    """Raises AttentionProviderError if a hook is refused.

    Args:
        path: name of the module in `model` on which the hook is registered.
        name: of the hook in its registry.
    """
    rule = RULES.get(class_name(hook))
    within = f"'{path}' in {type(model).__name__}" if path else type(model).__name__
    has = f"{within} has a hook of diffusers, {type(hook).__name__} ('{name}')"
    if rule is None:
        if getattr(type(hook), DECLARED, False) or (not path and not split.arguments and not split.output):
            return
        raise AttentionProviderError(
            f"{has}, which is not known to be exact where a model is split between ranks. It receives this rank's part "
            f"of the tokens. Remove it (module._diffusers_hook.remove_hook('{name}')), or disable context "
            "parallelism. If it computes each token separately and decides the same on all ranks, declare it in its "
            f"class: {DECLARED} = True."
        )
    reason = None if rule.refuse is None else rule.refuse(hook)
    if reason is not None:
        raise AttentionProviderError(f"{has}, which cannot run where a model is split between ranks: {reason}")
    needed = [each for each in rule.needs if each in split.arguments]
    if not path and (needed or (rule.needs_output and split.output)):
        raise AttentionProviderError(
            f"{has}, which needs the full {', '.join(needed) or 'output'}. The plan splits or gathers it at the model "
            'itself (the entry ""), so that the hook gets only a part. Split and gather it at modules within the model '
            "instead, or remove the hook (model.disable_cache())."
        )
