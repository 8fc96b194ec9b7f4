"""The common part of the hooks of all plan words.

A word of an entry (`CPHalo`) has a function `hooks(place, word)`, which yields functions that set its hooks on the
module. A word of an argument (`CPLength`) has a subclass of `ArgumentHook`, which changes the argument. Names and
positions are looked up when a hook is made, so that a compiler can trace a hook into the graph of its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....errors import AttentionProviderError
from ....nested import describe, like, updated
from ...sequences.tracker import SequenceTracker

SetHook = Callable[[], RemovableHandle]
"""Sets one hook on a module."""


class Place(NamedTuple):
    """A module that an entry of a plan names."""

    module: nn.Module
    path: str
    """The entry's name, which may stand for several modules: "blocks.*.attn". A compiler makes a graph for every value
    that it reads, so that only errors may read this."""
    name: str
    """The module's own name, "blocks.3.attn", for errors."""
    tracker: SequenceTracker


MakeHooks = Callable[[Place, Any], Iterator[SetHook]]
"""Yields what sets the hooks of a word on the module at a place."""


class ArgumentHook:
    """Changes one argument, or one output, of a module as a plan word says."""

    accepts: str
    """The accepted values, for errors."""
    needs_value = False
    """Whether a call without the argument is an error."""

    def __init__(self, spec: Any, place: Place) -> None:
        self.spec = spec
        self.path = place.path
        self.tracker = place.tracker

    @staticmethod
    def changes_value(spec: Any) -> bool:
        """Whether the module receives another value than its caller gave."""
        return True

    @staticmethod
    def is_for_output(spec: Any) -> bool:
        """Whether the word stands for an output of the module."""
        return False

    def apply(self, value: Any, what: str, outputs: Sequence[Any] = ()) -> Any:
        """The value that the module, or for an output its caller, receives.

        Args:
            value: the argument or output. None stays None.
            what: its name, for errors.
            outputs: for an output, all outputs of the module, for errors.

        Raises:
            AttentionProviderError: the word does not accept the value.
        """
        return None if value is None else self.change(value, what, outputs)

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        """`apply`, for values other than None."""
        raise NotImplementedError

    def not_accepted(self, value: Any, what: str) -> AttentionProviderError:
        """The error for a value that the word does not accept."""
        return AttentionProviderError(
            f"{what} of '{self.path}' is {describe(value)}. Its plan has {self.spec}, which accepts {self.accepts}."
        )


class TensorHook(ArgumentHook):
    """Changes a tensor, or every tensor in lists, tuples and dicts."""

    accepts = "a tensor, or a list, tuple or dict of tensors"

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        if isinstance(value, Tensor):
            return self.change_tensor(value, what, outputs)
        if isinstance(value, (list, tuple)):
            return like(value, [self.apply(each, f"{what}[{i}]") for i, each in enumerate(value)])
        if isinstance(value, Mapping):
            return updated(value, {name: self.apply(value[name], f"{what}.{name}") for name in value})
        raise self.not_accepted(value, what)

    def change_tensor(self, tensor: Tensor, what: str, outputs: Sequence[Any]) -> Tensor:
        """The tensor that the module receives."""
        raise NotImplementedError


def check_dims(tensor: Tensor, spec: Any, entry: str) -> None:
    """Raises AttentionProviderError unless `tensor` has as many dimensions as `spec` expects."""
    if spec.expected_dims is not None and tensor.ndim != spec.expected_dims:
        raise AttentionProviderError(
            f"{entry} has {tensor.ndim} dimensions, {list(tensor.shape)}; the plan expects {spec.expected_dims}. "
            f"Correct expected_dims and the dimension in {spec}, or leave expected_dims out."
        )
