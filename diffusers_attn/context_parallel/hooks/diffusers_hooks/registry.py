"""The registry in which diffusers keeps the hooks of a module.

Private names of diffusers in this file: `_diffusers_hook` of a module, `_module_ref` of its `HookRegistry`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..submodules import original


def hooks_on(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and hooks that are registered on a module."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.items())


def hooks_in(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Paths of modules, and names and hooks that are registered there."""
    for path, module in model.named_modules():
        for name, hook in hooks_on(module):
            yield path, name, hook


def class_name(hook: Any) -> str:
    """Full name of a hook's class, by which `RULES` has it."""
    return f"{type(hook).__module__}.{type(hook).__qualname__}"


_Register = Callable[[nn.Module, Any, str], Callable[[], None]]


@functools.cache  # diffusers is patched once
def install(on_register: _Register, on_remove: Callable[[], None]) -> None:
    """Patches diffusers' registry, so that it reports hooks as they are registered and removed.

    Args:
        on_register: called with a module, a hook and its name before the hook is registered. It may raise. The function
            that it returns is called afterwards.
        on_remove: called after a hook was removed.
    """
    from diffusers.hooks.hooks import HookRegistry

    register, remove = HookRegistry.register_hook, HookRegistry.remove_hook

    @functools.wraps(register)
    def register_hook(self: Any, hook: Any, name: str) -> None:
        registered = on_register(original(self._module_ref), hook, name)
        register(self, hook, name)
        registered()

    @functools.wraps(remove)
    def remove_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        remove(self, *args, **kwargs)
        on_remove()

    HookRegistry.register_hook = register_hook  # type: ignore[method-assign]
    HookRegistry.remove_hook = remove_hook  # type: ignore[method-assign]
