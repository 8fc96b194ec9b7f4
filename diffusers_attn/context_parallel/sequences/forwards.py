"""The forwards of a model that are running: nested ones, interrupted ones, and parts that a backward computes again.

A forward begins in a hook of the model and ends in another. Between them, all attention of the thread belongs to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ..mesh import ContextParallelMesh
from .active import active
from .layout import LayoutState, SequenceLayout
from .roles import REPLICATED, Role

if TYPE_CHECKING:
    from .tracker import SequenceTracker


class _Forward(NamedTuple):
    """A running forward, and the state that it interrupted."""

    frame: FrameType | None
    """Frame of the call of the model. None while the model is being compiled, and for a recomputation."""
    outer: SequenceTracker | None
    """Tracker whose forward this one runs in, in the same thread."""
    state: LayoutState | None
    """Layout of that forward, if it is one of the same model."""
    role: Role | None
    """Role of the attention module that was running."""
    depth: int
    """Number of attention modules of the same model that were running."""


class RunningForwards(SequenceLayout):
    """A layout that follows the forwards and the attention modules of its model."""

    def __init__(self, mesh: ContextParallelMesh) -> None:
        super().__init__(mesh)
        self.role: Role | None = None
        """Role of the running attention module, if the plan gives one."""
        self.reached = False
        """Whether the running forward has made an attention call here, or one that the plan calls local."""
        self._forwards: list[_Forward] = []
        self._outer: list[Role | None] = []
        """For each running attention module, the role before it."""
        self._reached: list[bool] = []
        """For each running attention module, whether it has made a call here, or need not make one."""

    def clear(self) -> None:
        """Clears the records of an earlier forward."""
        super().clear()
        self._shared: dict[int, tuple[Any, Any]] = {}

    def begin_forward(self, frame: FrameType | None = None) -> None:
        """Begins a forward of the model.

        Args:
            frame: of the call. If the forward is interrupted, the frame shows that it is over.
        """
        outer = active.tracker
        if outer is not None and outer.is_over():
            outer = None
        nested = outer is self
        if not nested:
            self._forget_running()
        state = self.state() if nested else None
        self._forwards.append(_Forward(frame, outer, state, self.role, len(self._outer)))
        self.role = None
        self.reached = False
        self.clear()
        active.tracker = cast("SequenceTracker", self)

    def end_forward(self) -> None:
        """Ends a forward, also after an error. The one that it interrupted goes on."""
        if not self._forwards:
            return
        before = self._forwards.pop()
        self._cut(before.depth)
        self.role = before.role
        self._shared.clear()
        if before.state is not None:
            self._replace(before.state)
        active.tracker = before.outer

    def is_over(self) -> bool:
        """Whether the forward was left without running its last hook, as `KeyboardInterrupt` leaves it."""
        if not self._forwards or not _has_returned(self._forwards[-1].frame):
            return False
        self._forget_running()
        return True

    @contextlib.contextmanager
    def recomputing(self, state: LayoutState, role: Role | None) -> Iterator[None]:
        """Computes a part of an earlier forward again, with its layout and role, as gradient checkpointing does in a
        backward."""
        reached = self.reached
        self._forwards.append(_Forward(None, active.tracker, self.state(), self.role, len(self._outer)))
        self._replace(state)
        self.role, active.tracker = role, cast("SequenceTracker", self)
        try:
            yield
        finally:  # also where the checkpoint stops early, because it has all tensors that it needs
            self.end_forward()
            self.reached = reached

    def _replace(self, state: LayoutState) -> None:
        if (dict(self.lengths), self.blocks) != (state.lengths, state.blocks):
            self.clear()
            self.restore(state)

    def _forget_running(self) -> None:
        self._forwards.clear()
        self._outer.clear()
        self._reached.clear()
        self.role = None

    def _cut(self, depth: int) -> None:
        while len(self._outer) > depth:
            self._outer.pop()
            self._reached.pop()

    @property
    def has_begun(self) -> bool:
        """Whether a forward of the model, or a part that is computed again, runs in any thread."""
        return len(self._forwards) > 0

    @property
    def is_running(self) -> bool:
        """Whether a forward of the model, or a part that is computed again, runs in this thread."""
        return active.tracker is self

    @property
    def is_in_attention(self) -> bool:
        """Whether an attention module is running."""
        return len(self._outer) > 0

    def begin_attention(self, role: Role | None) -> None:
        """Begins an attention module, in a forward or in a recomputation.

        Args:
            role: from the plan. A module without one, inside a module that has all tokens, has all tokens too.
        """
        self._outer.append(self.role)
        if role is None and self.role == REPLICATED:
            role = REPLICATED
        self._reached.append(not self.is_split or role == REPLICATED)
        self.role = role
        active.tracker = cast("SequenceTracker", self)

    def end_attention(self, needs_none: bool = False) -> bool:
        """Ends an attention module.

        Args:
            needs_none: whether the module need not make a call here.

        Returns:
            Whether it has made one, or need not: also because nothing was split when it began.
        """
        self.role = self._outer.pop()
        reached = self._reached.pop() or needs_none
        if reached:
            self.note_attention()
        if not self._outer and not self._forwards:
            active.tracker = None
        return reached

    def note_attention(self) -> None:
        """Notes that the running forward and attention module have made an attention call here."""
        self.reached = True
        if self._reached:
            self._reached[-1] = True

    def once(self, of: Any, make: Callable[[], Any]) -> Any:
        """The result of `make` for an object that all layers of a forward share. It is computed in the first layer and
        kept until the forward ends."""
        if torch.compiler.is_compiling():
            return make()
        if id(of) not in self._shared:
            self._shared[id(of)] = of, make()
        return self._shared[id(of)][1]


def _has_returned(frame: FrameType | None) -> bool:
    """Whether the function of `frame` has returned or raised. Then its variables are cleared."""
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # "cannot clear an executing frame"
        return False
    return True
