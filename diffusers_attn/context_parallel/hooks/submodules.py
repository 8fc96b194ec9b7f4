"""Finds the modules that a name in a plan stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...errors import AttentionProviderError


def submodules(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that a name in a plan stands for. Raises AttentionProviderError if there are none."""
    if not path:
        yield module
        return
    name, _, rest = path.partition(".")
    name, optional = name.removesuffix("?"), name.endswith("?")
    children = {name: child for name, child in original(module)._modules.items() if child is not None}
    if name == "*":
        found = list(children.values())
        if isinstance(original(module), nn.ModuleList) and not found:
            return  # a model without blocks of one kind
    elif name.lstrip("-").isdigit() and isinstance(original(module), (nn.ModuleList, nn.Sequential)):
        index = int(name)
        found = list(children.values())[index:][:1] if index < 0 else list(children.values())[index : index + 1]
        found = found if -len(children) <= index else []
    else:
        found = [children[name]] if name in children else []
    if not found and not optional:
        raise AttentionProviderError(
            f"the plan names '{path}', and {type(original(module)).__name__} has no '{name}'. It has: "
            f"{', '.join(children) or 'no submodules'}."
        )
    for child in found:
        yield from submodules(child, rest)


def original(module: Any) -> Any:
    """`module` without the wrapper of torch.compile."""
    return getattr(module, "_orig_mod", module)
