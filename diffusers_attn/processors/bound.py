"""A processor bound to a provider: a view of the original, with the same attributes and another attention call.

The view is an instance of a subclass of the original's class and shares its `__dict__`. A weight that is moved, a scale
that is set or a hook that is added through the one is there in the other; so nothing has to be carried back when the
view goes, and the original is then what it would have been without it.
"""

from __future__ import annotations

import copy
import functools
import threading
from types import FunctionType
from typing import Any

from ..scope import ProviderChoice
from . import ace_step, anyflow_far, mochi, nabla, wan_animate2
from .doors import dispatch_door, sdpa_door
from .overlay import Overlay, calls_attention, names_in
from .requests import check_note

_lock = threading.RLock()

# What processors that cannot be bound call, and what to say about it.
_INSTEAD = {
    "get_attention_scores": "it computes the scores itself, with get_attention_scores",
    "memory_efficient_attention": "it calls xformers itself",
    "scaled_dot_product_attention": "it must be a global, or an attribute of the global torch.nn.functional",
}

# Processors that do more than their code does with another attention call: what they call instead, by class.
_OWN = {each.PROCESSOR: each.methods for each in (ace_step, anyflow_far, mochi, wan_animate2)} | dict.fromkeys(
    nabla.PROCESSORS, nabla.methods
)


class BoundProcessor:
    """The common base of bound processors' classes. Without state of its own beyond these two."""

    __slots__ = ()
    original: Any
    """The processor that this is a view of."""
    choice: ProviderChoice | None
    """The provider; None follows the scope."""

    # diffusers compares classes exactly: `processor.__class__ in CROSS_ATTENTION_PROCESSORS`, and the look-ups of its
    # hooks. It also makes new processors of the same kind by `processor.__class__()`.
    __class__ = property(lambda self: type(self.original))

    def __setattr__(self, name: str, value: Any) -> None:
        check_note(name, value, self.choice)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return bind, (self.original, self.choice)

    def __copy__(self) -> Any:
        return bind(copy.copy(self.original), self.choice)


def bind(processor: Any, choice: ProviderChoice | None) -> Any:
    """`processor` with its attention calls going to `choice` (None: wherever the scope says).

    A bound processor is bound anew. One for which there is an `obstacle` is returned as it is.
    """
    original = unbind(processor)
    cls: type = type(original)
    with _lock:
        bound_class = _bound_class(cls, choice)
    if bound_class is None:
        return original
    if type(processor) is bound_class:
        return processor
    view: Any = object.__new__(bound_class)
    # Not by plain assignment, which nn.Module would take for a submodule.
    object.__setattr__(view, "__dict__", original.__dict__)
    object.__setattr__(view, "original", original)
    return view


def unbind(processor: Any) -> Any:
    """The original of a bound processor; any other processor as it is."""
    return processor.original if isinstance(processor, BoundProcessor) else processor


def obstacle(processor: Any) -> str | None:
    """Why `processor` cannot be bound; None if it can."""
    if processor is None:
        return "it has no processor"
    cls: type = type(unbind(processor))
    if _attention_methods(cls):
        return None
    call = cls.__call__
    names = set(names_in(call.__code__)) if isinstance(call, FunctionType) else set()
    reason = f"{cls.__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention"
    for name, instead in _INSTEAD.items():
        if name in names:
            return f"{reason}: {instead}"
    return reason


@functools.cache
def _attention_methods(cls: type) -> dict[str, FunctionType]:
    """The methods of `cls`, own and inherited, that call attention."""
    methods: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "torch":
            methods.update(vars(base))
    return {name: method for name, method in methods.items() if calls_attention(method)}


@functools.cache
def _bound_class(cls: type, choice: ProviderChoice | None) -> type | None:
    """One class per class and choice, so that what is compiled for one processor serves all of its kind."""
    methods = _attention_methods(cls)
    if not methods:
        return None
    overlay = _overlay(choice)
    namespace: dict[str, Any] = {name: overlay.rebuild(method) for name, method in methods.items()}
    call = methods.get("__call__")
    if call is not None:  # by the method, and not the class: one that derives from it may have another
        own = _OWN.get(f"{call.__module__}.{call.__qualname__}".removesuffix(".__call__"))
        namespace |= {} if own is None else own(call, overlay)
    namespace |= {"__slots__": ("original",), "__module__": cls.__module__, "choice": choice}
    return type(f"{cls.__name__}[{choice.provider if choice else 'scope'}]", (BoundProcessor, cls), namespace)


@functools.cache
def _overlay(choice: ProviderChoice | None) -> Overlay:
    return Overlay(dispatch_door(choice), sdpa_door(choice))
