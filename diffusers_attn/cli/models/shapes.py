"""The shapes of arguments and outputs at the places that a plan names, from one forward of a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...context_parallel.hooks.submodules import submodules
from ...cp_plans.plan import Plan

Shapes = dict[str, tuple[int, ...]]


class Places:
    """The modules that a plan names, with the shapes that reach them.

    Args:
        model: a model of the plan's class.
        plan: its plan.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.modules = {path: list(submodules(model, path)) for path in plan}
        self._arguments: dict[str, Shapes] = {}
        self._outputs: dict[str, Shapes] = {}

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Runs one forward, and keeps the shapes of the first call at each place."""
        handles = []
        for path, modules in self.modules.items():
            if modules:
                handles.append(modules[0].register_forward_pre_hook(self._before(path), with_kwargs=True))
                handles.append(modules[0].register_forward_hook(self._after(path)))
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def shape(self, path: str, place: str, name: str) -> tuple[int, ...] | None:
        """The shape of an argument or output at a module; None if it is not a tensor, or the forward did not pass it.

        Args:
            path: the module's name in the plan.
            place: "argument" or "output".
            name: name or number, as in `plan_in_words.Line`.
        """
        return (self._arguments if place == "argument" else self._outputs).get(path, {}).get(name)

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in self._arguments:
                return
            found: Shapes = {}
            for i, value in enumerate(args):
                _keep(found, str(i), value)
            parameters = list(inspect.signature(module.forward).parameters)
            for name, value in {**dict(zip(parameters, args)), **kwargs}.items():
                _keep(found, name, value)
                if name in parameters:
                    _keep(found, str(parameters.index(name)), value)
            self._arguments[path] = found

        return hook

    def _after(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if path in self._outputs:
                return
            found: Shapes = {}
            if isinstance(output, torch.Tensor):
                _keep(found, "0", output)
            elif isinstance(output, Mapping):
                for i, (name, value) in enumerate(output.items()):
                    _keep(found, str(name), value)
                    _keep(found, str(i), value)
            elif isinstance(output, (list, tuple)):
                for i, value in enumerate(output):
                    _keep(found, str(i), value)
            self._outputs[path] = found

        return hook


def _keep(found: Shapes, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = tuple(value.shape)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _keep(found, f"{name}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            _keep(found, f"{name}[{i}]", each)
