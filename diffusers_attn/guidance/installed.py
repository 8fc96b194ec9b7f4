"""Puts a `GuidedCall` around the call of a model: around the compiled one, where the model is compiled as a whole.

A compiled call must be within it, since ranks of other groups do not run the model at all. `nn.Module.__call__` runs
`_compiled_call_impl` of a module on which `compile` was called, and otherwise `_call_impl`, with all hooks. The wrapper
that `torch.compile(model)` returns is a module of its own.

Private names of PyTorch, which only this file sets: `_call_impl`, `_compiled_call_impl`.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from .guided_call import GuidedCall

_CALL, _COMPILED, _COMPILE = "_call_impl", "_compiled_call_impl", "compile"


class _Installed:
    """Takes the place of the method `compile` of a model, whose new compiled call gets the `GuidedCall` as well."""

    def __init__(self, model: nn.Module, called: nn.Module, call: GuidedCall) -> None:
        self.model = weakref.ref(model)
        self.called = weakref.ref(called)
        self.guided = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        model = self.model()
        if model is None:
            raise RuntimeError("the model whose method this is does not exist any more")
        called = self.called()
        uninstall(model)
        try:
            model.compile(*args, **kwargs)
        finally:
            install(model, model if called is None else called, self.guided)


def install(model: nn.Module, called: nn.Module, call: GuidedCall) -> None:
    """Replaces the call of `model`.

    Args:
        model: the model.
        called: what its callers call: the wrapper that `torch.compile(model)` returned, or the model itself.
        call: takes the place of its call.
    """
    compiled = called._compiled_call_impl
    reference = weakref.ref(called)  # nobody keeps a model that its user deletes
    call.run = compiled if compiled is not None else lambda *args, **kwargs: _own_call(reference(), args, kwargs)
    vars(called)[_CALL if compiled is None else _COMPILED] = call
    vars(model)[_COMPILE] = _Installed(model, called, call)


def _own_call(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if module is None:
        raise RuntimeError("the model whose call this is does not exist any more")
    return nn.Module._call_impl(module, *args, **kwargs)


def uninstall(model: nn.Module) -> None:
    """Undoes `install`. Does nothing if it was not called."""
    installed = vars(model).pop(_COMPILE, None)
    called = None if installed is None else installed.called()
    if called is None:
        return
    if vars(called).get(_CALL) is installed.guided:
        del vars(called)[_CALL]
    else:
        vars(called)[_COMPILED] = installed.guided.run


def guided_call(model: nn.Module) -> GuidedCall | None:
    """The call that replaces the model's; None if there is none."""
    installed = vars(getattr(model, "_orig_mod", model)).get(_COMPILE)
    return installed.guided if isinstance(installed, _Installed) else None


def without_call(state: dict[str, Any]) -> None:
    """Removes the call from the state of a copy of a model."""
    state.pop(_CALL, None)
    state.pop(_COMPILE, None)
