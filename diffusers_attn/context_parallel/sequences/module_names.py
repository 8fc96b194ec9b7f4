"""The name of the running module, for errors. Nothing tracks it, so it is read from the call stack."""

from __future__ import annotations

import sys

from torch import nn


def active_module() -> str:
    """Name and class of the innermost module whose code runs in this thread; "no module" if there is none."""
    modules: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            modules.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return "no module"
    for outer in reversed(modules):  # the outermost module that contains it has its full name
        for name, module in outer.named_modules():
            if module is modules[0]:
                return f"'{name}' ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    raise AssertionError("a module is a part of itself")
