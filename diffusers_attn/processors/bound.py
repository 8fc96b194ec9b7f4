"""A processor bound to a provider: a view of the original with the same attributes and another attention call.

The view is an instance of a subclass of the original's class and shares its `__dict__`. Moving a weight, setting a
scale or adding a hook on one of them affects both. So unbinding copies nothing back, and leaves the original as it
would be without the view.
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
from .requests import check_note

_lock = threading.RLock()
_before_first_binding: list[Callable[[], None]] = []

# Functions called by processors that cannot be bound, with the reason for the message.
_INSTEAD = {
    "get_attention_scores": "it computes the scores itself, with get_attention_scores",
    "memory_efficient_attention": "it calls xformers itself",
    "scaled_dot_product_attention": "that must be called as a global of its module, as with `import "
    "torch.nn.functional as F` and F.scaled_dot_product_attention(...)",
}

# Processors for which another attention call is not enough, with the methods that replace theirs, by class.
_OWN = {each.PROCESSOR: each.methods for each in (ace_step, anyflow_far, mochi, wan_animate2)} | dict.fromkeys(
    nabla.PROCESSORS, nabla.methods
)


class BoundProcessor:
    """The common base of bound processors' classes. Its only state is these two attributes."""

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


def before_first_binding(function: Callable[[], None]) -> None:
    """Has `function` called before a processor is bound, also by unpickling. It may be called several times."""
    _before_first_binding.append(function)


def bind(processor: Any, choice: ProviderChoice | None) -> Any:
    """`processor` with its attention calls going to `choice` (None: the provider of the active scope).

    A bound processor is bound again. A processor with an `obstacle` is returned unbound.
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
    """The original of a bound processor; any other processor as it is."""
    return processor.original if isinstance(processor, BoundProcessor) else processor


def obstacle(processor: Any) -> str | None:
    """Why `processor` cannot be bound; None if it can."""
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
                    f"{reason} itself, and calls of {named.__name__}.{attribute}(...) are followed only where "
                    f"{named.__name__} is used for nothing else in that function: call super().{attribute}(...)"
                )
    names = {name for method in visited for name in names_in(method.__code__)}
    for name, instead in _INSTEAD.items():
        if name in names:
            return f"{reason}: {instead}"
    if cls.__module__.partition(".")[0] == "diffusers":
        return reason
    return (
        f"{reason}, and names no function, class or super() that does. Calls through objects, such as self.inner(...), "
        f"are not followed: derive {cls.__name__} from the processor that it is to extend, and call "
        "super().__call__(...)"
    )


def _own_methods(cls: type, choice: ProviderChoice | None) -> dict[str, Any]:
    """The methods that `cls` itself defines and that call attention, rebuilt."""
    overlay, methods = _overlay(choice), {}
    for name, method in methods_of(cls).items():
        if calls_attention(method):
            kind, rebuilt = type(vars(cls)[name]), overlay.rebuild(method)
            methods[name] = rebuilt if kind is FunctionType else kind(rebuilt)
    call = methods_of(cls).get("__call__")
    if call is not None and "__call__" in methods:  # by the method, and not the class: another may share it
        own = _OWN.get(f"{call.__module__}.{call.__qualname__}".removesuffix(".__call__"))
        methods |= {} if own is None else own(call, overlay)
    return methods


def _redirected_bases(cls: type, choice: ProviderChoice | None) -> tuple[type, ...]:
    """`cls` and, for each base class with methods that call attention, a class that comes before it in the order of
    method resolution, with these methods rebuilt. So `super()` finds them."""
    shadows = (_shadow(base, choice) for base in layers(cls)[1:])
    return cls, *(each for each in shadows if each is not None)


@functools.cache
def _shadow(cls: type, choice: ProviderChoice | None) -> type | None:
    methods = _own_methods(cls, choice)
    return type(cls)(cls.__name__, (cls,), methods | _like(cls)) if methods else None


_redirects: dict[tuple[type, ProviderChoice | None], type] = {}


def _redirected(cls: type, choice: ProviderChoice | None) -> type:
    """`cls` with its attention calls going to `choice`, for functions that call a method of it by its name."""
    if (cls, choice) not in _redirects:
        bases = _redirected_bases(cls, choice)
        made = _redirects[cls, choice] = type(cls)(cls.__name__, bases, _like(cls))
        for name, method in _own_methods(cls, choice).items():  # which may name the class
            setattr(made, name, method)
    return _redirects[cls, choice]


def _like(cls: type) -> dict[str, Any]:
    return {"__slots__": (), "__module__": cls.__module__}


@functools.cache
def _bound_class(cls: type, choice: ProviderChoice | None) -> type | None:
    """One class per class and choice, so that what is compiled for one processor serves all of its kind."""
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
