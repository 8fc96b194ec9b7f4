"""The inputs of a guided step, equal on all ranks.

Ranks compare and exchange the inputs of the first call of a step, where all of them begin it together. In later calls
of the step a rank must not wait for others, which still compute. Their inputs are the latents of the first call, and
prompts that were exchanged in an earlier step: the values that were received then are used again. Inputs that are new
are compared when the step's outputs are exchanged. If they differ, those calls are made again.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..nested import mapped, tensors_in
from .branches import version_of
from .groups import Groups

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class InputHook(Protocol):
    """The forward pre-hook that keeps inputs equal. It does nothing while it is paused."""

    paused: bool

    def alike(self, tensors: Sequence[Tensor], plain: str) -> bool:
        """Whether these are equal on all ranks, which must all call this."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class StepInputs:
    """The inputs of one model's steps.

    Args:
        model: returns the model.
        hook: the model's hook over all ranks; None if inputs are trusted to be equal.
        within: makes the hook over the ranks of one group; None if the group has one rank.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        hook: InputHook | None,
        within: Callable[[Groups], InputHook | None],
    ) -> None:
        self._model = model
        self._hook = hook
        self._make = within
        self._within: dict[int, InputHook | None] = {}
        self._received: dict[int, tuple[weakref.ref[Tensor], int | None, Callable[[], Tensor | None]]] = {}
        """Tensors of this rank, by id, and what was received in their place; the tensor itself if that is equal."""
        self._new: list[Tensor] = []
        self._plain: list[str] = []

    def exchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The first rank's inputs. All ranks must call this."""
        if self._hook is None:
            return args, kwargs
        new = self._hook(self._model(), args, kwargs)
        self._remember((args, kwargs), new)
        return new[0], new[1]

    def later(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The inputs of a later call of a step, for `confirm` to compare. All ranks must call this."""
        if self._hook is None:
            return args, kwargs
        self._new += [each for each in tensors_in((args, kwargs)) if self._known(each) is None]
        self._plain.append(repr(mapped((args, kwargs), lambda each: f"{list(each.shape)} {each.dtype}")))
        new: Arguments = mapped((args, kwargs), lambda each: each if self._known(each) is None else self._known(each))
        return new

    def knows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all tensors among the inputs of a later call were received before. Equal on all ranks."""
        return self._hook is None or all(self._known(each) is not None for each in tensors_in((args, kwargs)))

    def confirm(self) -> bool:
        """Whether the inputs of the step's later calls are equal on all ranks. All ranks must call this."""
        new, plain, self._new, self._plain = self._new, self._plain, [], []
        if self._hook is None or not plain:
            return True
        alike = self._hook.alike(new, "; ".join(plain))
        if alike:
            self._remember(new, new)
        return alike

    def within(self, groups: Groups, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The inputs of this rank's group for a call that it computes. All of its ranks must call this."""
        if self._hook is None:
            return args, kwargs
        if groups.count not in self._within:
            self._within[groups.count] = self._make(groups)
        hook = self._within[groups.count]
        return (args, kwargs) if hook is None else hook(self._model(), args, kwargs)

    @contextlib.contextmanager
    def as_given(self) -> Iterator[None]:
        """Calls of the model take their inputs as they are."""
        if self._hook is None:
            yield
            return
        before, self._hook.paused = self._hook.paused, True
        try:
            yield
        finally:
            self._hook.paused = before

    def _known(self, tensor: Tensor) -> Tensor | None:
        """What is received in place of this tensor; None if that is not known."""
        found = self._received.get(id(tensor))
        version = version_of(tensor)  # None for an inference tensor, of which changes in place go unnoticed
        if found is None or version is None or found[0]() is not tensor or found[1] != version:
            return None
        return found[2]()

    def _remember(self, own: Any, received: Any) -> None:
        self._received = {key: each for key, each in self._received.items() if each[0]() is not None}
        for mine, theirs in zip(tensors_in(own), tensors_in(received), strict=True):
            reference = weakref.ref(mine)
            # A strong reference to this rank's own tensor would keep it alive.
            value: Callable[[], Tensor | None] = reference if mine is theirs else functools.partial(_same, theirs)
            self._received[id(mine)] = reference, version_of(mine), value


def _same(tensor: Tensor) -> Tensor:
    return tensor
