"""Keeps compiled graphs of a model apart, by whether its hooks are set.

When Dynamo decides whether a graph may run again, it does not look at hooks: a graph from before the hooks would go on
running without them. It does look at `forward`, which many tools replace: a graph is kept for modules whose instance
has no `forward`, or has one with the same code. So a split model's modules get a `forward` that only calls the previous
one, with code objects made for this model. Graphs from before wait until the hooks are removed, those with hooks are
dropped then, and graphs of other models stay, also of the same class.

The model itself keeps its `forward`, which CUDA graphs and offloading replace. A graph that calls the model contains
calls of its blocks.

Cache entries of Dynamo are private to PyTorch, and only this file uses them.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_own: weakref.WeakSet[FunctionType] = weakref.WeakSet()
_codes_to_drop: list[CodeType] = []
"""Codes of models that are not split any more. Those of a model that was freed wait for the next call of this file: it
may be freed by a garbage collection while Dynamo compiles, and Dynamo would go on to use the dropped graphs."""


class OwnForwards:
    """The modules of one split model that have a `forward` of their own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._codes: dict[type[nn.Module], CodeType] = {}
        """A code object per class, since Dynamo limits the number of graphs of one code object."""
        # An instance whose attribute is its own method is not freed before the next garbage collection.
        weakref.finalize(model, self._restore).atexit = False
        _drop_graphs()

    def give(self, module: nn.Module) -> None:
        """Gives `module` a `forward` that no graph was compiled for, unless it is the model itself."""
        if module is self._model():
            return
        if hasattr(module, "_orig_mod"):  # torch.compile runs the hooks of its wrapper outside of graphs
            return
        if module in self._modules and _is_own(vars(module).get("forward")):
            return
        cls = type(module)
        if cls not in self._codes:
            self._codes[cls] = _calling(None).__code__.replace()
        _replace(module, self._codes[cls])
        self._modules.add(module)

    def remove(self) -> list[nn.Module]:
        """Restores each `forward`, and drops the graphs that were compiled since. Returns the modules."""
        modules = self._restore()
        _drop_graphs()
        return modules

    def _restore(self) -> list[nn.Module]:
        modules = list(self._modules)
        for module in modules:
            if _is_own(vars(module).get("forward")):
                _restore(vars(module))
            else:  # another tool has replaced it since, maybe by what graphs with hooks were compiled for
                _replace(module, _calling(None).__code__.replace())
        self._modules.clear()
        _codes_to_drop.extend(self._codes.values())
        self._codes.clear()
        return modules


def is_replaced(module: nn.Module) -> bool:
    """Whether another tool has replaced the `forward` of this instance, as offloading and hooks of diffusers do."""
    return "forward" in without_own(vars(module))


def without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's `__dict__` as if its `forward` were not one of this file."""
    found = dict(state)
    if _is_own(found.get("forward")):
        _restore(found)
    return found


def _calling(forward: Any) -> Any:
    def own_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return own_forward


def _replace(module: nn.Module, code: CodeType) -> None:
    before = vars(module).get("forward")
    forward = type(module).forward if before is None else _without_self(before)
    own: Any = functools.wraps(forward)(_calling(forward))
    own.__code__ = code
    own.replaced = before
    _own.add(own)
    vars(module)["forward"] = MethodType(own, module)


def _without_self(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def _is_own(forward: Any) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ in _own


def _restore(state: dict[str, Any]) -> None:
    before = state["forward"].__func__.replaced
    if before is None:
        del state["forward"]
    else:
        state["forward"] = before


def _drop_graphs() -> None:
    """Drops the graphs that depend on one of `_codes_to_drop`."""
    if not _codes_to_drop or "torch._dynamo" not in sys.modules:
        return
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo import convert_frame
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    with convert_frame.compile_lock:
        while _codes_to_drop:
            code = _codes_to_drop.pop()
            # Dynamo waits for the end of each object that a graph depends on. Graphs reference the code, so that it
            # would come late.
            for reference in weakref.getweakrefs(code):
                if isinstance(reference.__callback__, weakref.finalize):
                    reference.__callback__()
            reset_code(code)
        # Invalid graphs of functions that call the model count for their limit until all graphs of these are dropped.
        for seen in list(convert_frame.input_codes.seen):
            outer = seen()
            if outer is not None and any(
                isinstance(entry.guard_manager, DeletedGuardManagerWrapper)
                for entry in _debug_get_cache_entry_list(outer)
            ):
                reset_code(outer)
