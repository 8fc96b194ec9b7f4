"""`CPAttention`: names the sequences of an attention module, and checks that this library computes its attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from ....cp_plans.plan import CPAttention
from ....errors import AttentionProviderError
from ....tracing.errors import raise_error
from ...sequences.roles import REPLICATED, Role
from ...sequences.tracker import SequenceTracker
from ..within import check_called
from .base import Place, SetHook


def hooks(place: Place, spec: CPAttention) -> Iterator[SetHook]:
    """The hooks of an attention module with a role."""
    keys = spec.query if spec.key is None else spec.key
    role = Role(tuple(spec.query), tuple(keys), spec.outer_mask, spec.key_mask, spec.row_mask, spec.prefix)
    if spec.prefix is not None:
        place.tracker.replicated.add(spec.prefix)
    yield from _hooks(place, role, spec.bound)


def hooks_without_role(place: Place, spec: None = None) -> Iterator[SetHook]:
    """The hooks of an attention module that the plan does not name."""
    yield from _hooks(place, None)


def hooks_with_all_tokens(place: Place) -> Iterator[SetHook]:
    """The hooks of a module that has all tokens of everything it attends to."""
    yield from _hooks(place, REPLICATED)


def _hooks(place: Place, role: Role | None, bound: bool = False) -> Iterator[SetHook]:
    module, tracker, name = place.module, place.tracker, place.name
    yield functools.partial(module.register_forward_pre_hook, EnterAttention(tracker, role, bound, name))
    yield functools.partial(module.register_forward_hook, LeaveAttention(tracker, role, name))


class EnterAttention:
    """A forward pre-hook that gives the tracker the role of the attention module that starts."""

    def __init__(self, tracker: SequenceTracker, role: Role | None, bound: bool, path: str) -> None:
        self.tracker = tracker
        self.role = role
        self.bound = bound
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        check_called(self, module)
        if self.role is not None and self.tracker.splits_blocks(self.role.key):
            _check_bound(module, "chooses its blocks from all tokens", "asks the other ranks")
        elif self.bound and self.tracker.mesh.size > 1:
            _check_bound(module, "uses positions in the full sequence", "adds this rank's offset")
        self.tracker.begin_attention(self.role)


class LeaveAttention:
    """A forward hook that refuses an output for which this library did not compute the attention over split tokens."""

    def __init__(self, tracker: SequenceTracker, role: Role | None, name: str) -> None:
        self.tracker = tracker
        self.is_local = role is not None and not (role.query and role.key)
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.tracker.end_attention(self.is_local or _is_bound(module)) and self.tracker.strict:
            raise_error(_computed_elsewhere, self, module)


def _is_bound(module: Any) -> bool:
    """Whether the module's processor calls no attention but this library's. Such a processor makes no call where
    attention is skipped, as by some guidance."""
    return hasattr(module, "processor") and (module.processor is None or hasattr(module.processor, "choice"))


def _computed_elsewhere(hook: LeaveAttention, module: Any) -> AttentionProviderError:
    processor = getattr(module, "processor", None)
    by = f"its processor is {type(processor).__name__}" if processor is not None else "it has no processor"
    return AttentionProviderError(
        f"'{hook.name}' ({type(module).__name__}) computes attention without diffusers_attn, so that it sees this "
        f"rank's tokens only ({by}). Bind it to a provider: model.set_attn_processor(DispatchProcessor()) does so for "
        "processors of diffusers. Or let its code call diffusers_attn.attention_dispatch. Or, if each rank has all "
        "keys that it needs, say so in the plan: "
        f'"{hook.name}": CPAttention((), key=()). To go on without context parallelism, call '
        "disable_context_parallel(model), or remove_context_parallel(model) where a plan was applied."
    )


def _check_bound(module: Any, what: str, instead: str) -> None:
    """Raises AttentionProviderError if the module has diffusers' own processor, which sees only this rank's tokens."""
    if not hasattr(module.processor, "choice"):
        raise AttentionProviderError(
            f"{type(module).__name__} {what}, and its processor, {type(module.processor).__name__}, sees only this "
            f"rank's. Bind the module to a provider, which gives it a processor that {instead}: "
            'model.set_attn_processor(DispatchProcessor("flex")).'
        )
