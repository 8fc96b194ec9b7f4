"""Two transformers as one module to train: one for high and one for low noise levels, each with its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EXPERT_OF = {"transformer": "high", "transformer_2": "low"}
"""Expert by the name of the pipeline's component."""


class Experts(nn.Module):
    """Transformers by the names of the pipeline's components. A forward runs one of them.

    A step trains one expert, so the other has no gradient in it, and the optimizer leaves it as it is.

    Args:
        transformers: the transformers by component name, with their adapters.
    """

    def __init__(self, transformers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, each in transformers.items():
            self.add_module(name, each)

    def forward(self, component: str | None, **inputs: Any) -> Any:
        """The output of the transformer that is the pipeline's `component`; None runs nothing."""
        return None if component is None else self.get_submodule(component)(**inputs)


def as_one_module(transformers: Mapping[str, nn.Module]) -> nn.Module:
    """The only transformer of a mapping, or an `Experts` of several."""
    return next(iter(transformers.values())) if len(transformers) == 1 else Experts(transformers)


def adapter_folder(component: str, several: bool) -> str:
    """The folder of a component's adapter in the output folder: "" if it is the only one, else "high" or "low"."""
    return EXPERT_OF[component] if several else ""


def weights_of(component: str, weights: Mapping[str, Tensor], several: bool) -> dict[str, Tensor]:
    """The adapter's weights of one component, with names as in its transformer.

    Args:
        component: the pipeline's component.
        weights: `adapter_weights` of what `as_one_module` returned.
        several: whether that was an `Experts`.
    """
    if not several:
        return dict(weights)
    start = f"{component}."
    return {name.removeprefix(start): each for name, each in weights.items() if name.startswith(start)}


def at_level(levels: Mapping[str, tuple[float, float]], u: float) -> str:
    """The component that is trained at noise level `u`: the first whose range has it, as a pipeline chooses it."""
    return next(name for name, (low, high) in levels.items() if low <= u <= high)


@contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules into evaluation mode without gradients within this context."""
    before = {name: each.training for name, each in modules.items()}
    for each in modules.values():
        each.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, each in modules.items():
            each.train(before[name])


def shard_each(experts: Experts, accelerator: Any) -> None:
    """Makes FSDP2 gather the layers outside of blocks for each expert by itself, as the pipeline calls it."""
    plugin = accelerator.state.fsdp_plugin
    wrapped = plugin.transformer_cls_names_to_wrap
    names = {type(each).__name__: each for each in experts.children()}
    if wrapped is None:
        wrapped = [name for each in names.values() for name in getattr(each, "_no_split_modules", None) or []]
    plugin.transformer_cls_names_to_wrap = [*dict.fromkeys([*wrapped, *names])]
