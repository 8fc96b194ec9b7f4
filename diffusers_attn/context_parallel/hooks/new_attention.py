"""Finds attention modules that were added to a model after its plan was applied. They have no hooks, and would attend
only to this rank's tokens."""

from __future__ import annotations

import weakref

from torch import nn

from ...errors import AttentionProviderError
from . import copies
from .attention_modules import is_attention
from .submodules import original


class KnownAttention:
    """Detects that attention modules of a model, or modules around them, were replaced.

    To visit all modules in every forward takes too long. So the modules on the way to attention modules are stored, and
    their children are compared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._remember(model)

    def _remember(self, model: nn.Module) -> None:
        holders: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            if name and is_attention(module):
                parts, holder = name.split("."), model
                for part in parts:
                    holders[id(holder)] = holder
                    holder = holder._modules[part]  # type: ignore[assignment]
        self._children = [
            (weakref.ref(holder), [None if each is None else weakref.ref(each) for each in holder._modules.values()])
            for holder in holders.values()
        ]

    def _is_as_before(self) -> bool:
        for reference, before in self._children:
            holder = reference()
            if holder is None or len(holder._modules) != len(before):
                return False
            for now, then in zip(holder._modules.values(), before):
                if now is not (None if then is None else then()):
                    return False
        return True

    def check(self, model: nn.Module) -> None:
        """Raises AttentionProviderError if `model` has attention modules that were added after its plan was applied."""
        if self._is_as_before():
            return
        for name, module in model.named_modules():
            if is_attention(module) and not copies.leaves_hooks_out(original(module)):
                raise AttentionProviderError(
                    f"'{name}' ({type(module).__name__}) was added to this {type(model).__name__} after its "
                    "sequences were split between ranks, and would attend to this rank's tokens only. Call "
                    "disable_context_parallel (or remove_context_parallel) before you change the model, and enable "
                    "context parallelism again afterwards."
                )
        self._remember(model)
