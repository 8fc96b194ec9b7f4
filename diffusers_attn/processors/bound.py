"""Bound processors: views of the original processor with the same attributes and another attention call.

A view is an instance of a subclass of the original's class and shares its `__dict__`. Moving a weight, setting a scale
or adding a hook on one of them affects both, so unbinding need not copy anything back.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ..scope import ProviderChoice
from . import ace_step, anyflow_far, mochi, nabla, wan_animate2
from .entry_points import dispatch_entry_point, sdpa_entry_point
from .overlay import Overlay
from .reachability import Visited, calls_attention, classes_named_in, layers, methods_of, names_in, reaches_attention
from .requests import check_request

_lock = threading.RLock()
_before_first_binding: list[Callable[[], None]] = []

# Reasons why a processor that calls one of these functions cannot be bound.
_UNSUPPORTED_CALLS = {
    "get_attention_scores": "it computes the scores itself, with get_attention_scores",
    "memory_efficient_attention": "it calls xformers itself",
    "scaled_dot_product_attention": "that must be called as a global of its module, as with `import "
    "torch.nn.functional as F` and F.scaled_dot_product_attention(...)",
}

# Functions that make replacement methods, for processor classes in which another attention call is not enough.
_REPLACEMENTS = {each.PROCESSOR: each.methods for each in (ace_step, anyflow_far, mochi, wan_animate2)} | dict.fromkeys(
    nabla.PROCESSORS, nabla.methods
)


class BoundProcessor:
    """The common base class of bound processors. Its only state is these two attributes."""

    __slots__ = ()
    original: Any
    """The original processor."""
    choice: ProviderChoice | None
    """The provider; None: the scope's."""

    # diffusers compares classes exactly: `processor.__class__ in CROSS_ATTENTION_PROCESSORS`, and the look-ups of its
    # hooks. It also makes new processors of the same kind by `processor.__class__()`.
    __class__ = property(lambda self: type(self.original))

    def __setattr__(self, name: str, value: Any) -> None:
        check_request(name, value, self.choice)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return bind, (self.original, self.choice)

    def __copy__(self) -> Any:
        return bind(copy.copy(self.original), self.choice)


def before_first_binding(function: Callable[[], None]) -> None:
    """Has `function` called before a processor is bound, also by unpickling. It may be called several times."""
    _before_first_binding.append(function)


def bind(processor: Any, choice: ProviderChoice | None) -> Any:
    """Returns `processor` with its attention calls bound to `choice` (None: the provider of the active scope).

    A bound processor is bound to the new choice. A processor with an `obstacle` is returned unbound.
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
    # Plain assignment would register an nn.Module as a submodule.
    object.__setattr__(view, "__dict__", original.__dict__)
    object.__setattr__(view, "original", original)
    return view


def unbind(processor: Any) -> Any:
    """The original of a bound processor; any other processor unchanged."""
    return processor.original if isinstance(processor, BoundProcessor) else processor


def obstacle(processor: Any) -> str | None:
    """The reason why `processor` cannot be bound; None if it can."""
    cls: type = type(unbind(processor))
    return "it has no processor" if processor is None else _obstacle(cls)


@functools.cache
def _obstacle(cls: type) -> str | None:
    visited: Visited = set()
    if reaches_attention(cls, visited):
        return None
    reason = f"{cls.__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention"
    for method in visited:
        for _, named, attribute, only in classes_named_in(method):
            if not only and hasattr(named, attribute) and reaches_attention(named, set()):
                return (
                    f"{reason} itself, and calls of {named.__name__}.{attribute}(...) are followed only if that "
                    f"function uses {named.__name__} for nothing else: call super().{attribute}(...)"
                )
    names = {name for method in visited for name in names_in(method.__code__)}
    for name, why in _UNSUPPORTED_CALLS.items():
        if name in names:
            return f"{reason}: {why}"
    if cls.__module__.partition(".")[0] == "diffusers":
        return reason
    return (
        f"{reason}, nor a function, class or super() that does. Calls through objects, such as self.inner(...), are "
        f"not followed: derive {cls.__name__} from the processor that it extends, and call super().__call__(...)"
    )


def _own_methods(cls: type, choice: ProviderChoice | None) -> dict[str, Any]:
    """Rebuilt versions of the methods that `cls` itself defines and that call attention."""
    overlay, methods = _overlay(choice), {}
    for name, method in methods_of(cls).items():
        if calls_attention(method):
            kind, rebuilt = type(vars(cls)[name]), overlay.rebuild(method)
            methods[name] = rebuilt if kind is FunctionType else kind(rebuilt)
    call = methods_of(cls).get("__call__")
    if call is not None and "__call__" in methods:  # looked up by method, since other classes may share it
        replace = _REPLACEMENTS.get(f"{call.__module__}.{call.__qualname__}".removesuffix(".__call__"))
        methods |= {} if replace is None else replace(call, overlay)
    return methods


def _redirected_bases(cls: type, choice: ProviderChoice | None) -> tuple[type, ...]:
    """`cls`, and a subclass of each base class that has methods that call attention, with these methods rebuilt.

    Each subclass precedes its base class in the method resolution order, so `super()` finds the rebuilt methods.
    """
    shadows = (_shadow(base, choice) for base in layers(cls)[1:])
    return cls, *(each for each in shadows if each is not None)


@functools.cache
def _shadow(cls: type, choice: ProviderChoice | None) -> type | None:
    methods = _own_methods(cls, choice)
    return type(cls)(cls.__name__, (cls,), methods | _like(cls)) if methods else None


_redirects: dict[tuple[type, ProviderChoice | None], type] = {}


def _redirected(cls: type, choice: ProviderChoice | None) -> type:
    """`cls` with its attention calls bound to `choice`, for functions that call its methods through the class."""
    if (cls, choice) not in _redirects:
        bases = _redirected_bases(cls, choice)
        made = _redirects[cls, choice] = type(cls)(cls.__name__, bases, _like(cls))
        for name, method in _own_methods(cls, choice).items():  # set afterwards, since they may name the class
            setattr(made, name, method)
    return _redirects[cls, choice]


def _like(cls: type) -> dict[str, Any]:
    return {"__slots__": (), "__module__": cls.__module__}


@functools.cache
def _bound_class(cls: type, choice: ProviderChoice | None) -> type | None:
    """The class of bound processors for a class and a choice. One class each, so that compiled code is shared."""
    if _obstacle(cls) is not None:
        return None
    for function in _before_first_binding:
        function()
    namespace = _own_methods(cls, choice) | _like(cls) | {"__slots__": ("original",), "choice": choice}
    name = f"{cls.__name__}[{choice.provider if choice else 'scope'}]"
    return type(name, (BoundProcessor, *_redirected_bases(cls, choice)), namespace)


@functools.cache
def _overlay(choice: ProviderChoice | None) -> Overlay:
    return Overlay(
        dispatch_entry_point(choice), sdpa_entry_point(choice), functools.partial(_redirected, choice=choice)
    )
