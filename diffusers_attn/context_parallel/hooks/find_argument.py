"""Where the forward of a module takes an argument."""

from __future__ import annotations

import inspect

from torch import nn

from ...cp_plans.plan import ParamId
from ...errors import AttentionProviderError
from .submodules import original


def as_param(key: ParamId | str | int) -> ParamId:
    """The argument that a key of a plan's entry names."""
    if isinstance(key, ParamId):
        return key
    return ParamId(index=key) if isinstance(key, int) else ParamId(key)


def argument_of(module: nn.Module, path: str, param: ParamId) -> tuple[str | None, int | None]:
    """Name and position of an argument of the module's forward, so that a hook finds it however a caller passes it.

    Args:
        path: the module's name in the plan, for errors.

    Returns:
        The name, None if it has none; and the position, None if it can only be passed by name.

    Raises:
        AttentionProviderError: the forward has no such argument.
    """
    parameters = list(inspect.signature(original(module).forward).parameters.values())
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    anywhere = names + [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]
    open_ended = any(each.kind == each.VAR_KEYWORD for each in parameters)
    if param.name in anywhere:
        return param.name, names.index(param.name) if param.name in names else None
    if param.index is not None and -len(names) <= param.index < len(names):
        index = param.index % len(names)
        return names[index], index
    if param.name is not None and open_ended:
        return param.name, None
    raise AttentionProviderError(
        f"the plan names argument {param} of '{path}', and the forward of {type(original(module)).__name__} has "
        f"{', '.join(anywhere) or 'none'}."
    )
