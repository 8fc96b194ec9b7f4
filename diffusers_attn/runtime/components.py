"""The models of a pipeline, with their calls watched: what `component_times` and `profile` share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import AttentionProviderError

_CALL = "_call_impl"  # what nn.Module's `__call__` runs
_METHODS = "encode", "decode"
"""Methods of autoencoders, which pipelines call instead of the module."""
Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""Given a component's name and its call, returns what runs instead."""


def components_of(pipeline: Any, function: str) -> dict[str, nn.Module]:
    """The models of a pipeline by name.

    Args:
        function: name of the public function that needs them, for the errors.

    Raises:
        AttentionProviderError: `pipeline` is no pipeline, or a component is compiled as a whole.
    """
    components = getattr(pipeline, "components", None)
    if isinstance(pipeline, nn.Module) or components is None:
        raise AttentionProviderError(
            f"{function} was given a {type(pipeline).__name__}; a diffusers pipeline is accepted."
        )
    models = {name: each for name, each in components.items() if isinstance(each, nn.Module)}
    compiled = next((name for name, each in models.items() if each._compiled_call_impl is not None), None)
    if compiled is not None:
        raise AttentionProviderError(
            f"'{compiled}' is compiled as a whole, so that its calls cannot be timed. Compile its blocks instead: "
            f"apply_compile(pipe.{compiled})."
        )
    return models


@contextlib.contextmanager
def watched(models: dict[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Watches the calls of these models, and of `encode` and `decode` of autoencoders ("vae.decode"). Compiled blocks
    and CUDA graphs stay as they are."""
    with contextlib.ExitStack() as undo:
        for name, model in models.items():
            undo.enter_context(_replaced(model, _CALL, functools.partial(watch, name)))
            for method in _METHODS if hasattr(model, "decode") else ():
                undo.enter_context(_replaced(model, method, functools.partial(watch, f"{name}.{method}")))
        yield


@contextlib.contextmanager
def _replaced(model: nn.Module, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces a method of one model. What replaces it again meanwhile, or removes it, stays in effect."""
    has_own, own = name in vars(model), vars(model).get(name)
    replaced = vars(model)[name] = change(getattr(model, name))
    try:
        yield
    finally:
        if vars(model).get(name) is replaced:
            if has_own:
                vars(model)[name] = own
            else:
                del vars(model)[name]
