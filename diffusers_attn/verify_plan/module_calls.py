"""The calls of all modules of a model: watched by hooks, or recorded with their inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nested import all_tensors_in


class ModuleCall(NamedTuple):
    """A call of a module in one process."""

    inputs: dict[str, Tensor]
    """Input tensors by name."""
    outputs: list[Tensor]


class ModuleWatch:
    """Context manager that sets hooks on all modules of a model.

    Args:
        model: the model.
        ended: called with (name, number of the call, inputs by name, output) when a module ends.
        began: called with (name, number of the call, inputs by name) when a module begins.
    """

    def __init__(
        self,
        model: nn.Module,
        ended: Callable[[str, int, dict[str, Tensor], Any], None],
        began: Callable[[str, int, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self._model = model
        self._ended = ended
        self._began = began
        self.entered: list[tuple[str, int, dict[str, Tensor]]] = []
        """The running modules, innermost last. A module that raises stays in the list."""

    def __enter__(self) -> ModuleWatch:
        self._calls: dict[str, int] = {}
        self._handles = []
        for name, module in self._model.named_modules():
            begin, end = self._hooks(name, module)
            self._handles += [
                module.register_forward_pre_hook(begin, with_kwargs=True),
                module.register_forward_hook(end),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        names = [each for each in inspect.signature(module.forward).parameters if each not in ("args", "kwargs")]

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = self._calls[name] = self._calls.get(name, -1) + 1
            placed = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)}
            inputs = _named({**placed, **kwargs})
            if self._began is not None:
                self._began(name, number, inputs)
            self.entered.append((name, number, inputs))

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._ended(*self.entered.pop(), output)

        return begin, end


def _named(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        tensors = all_tensors_in(value)
        found |= {name if len(tensors) == 1 else f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}
    return found


def record(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[tuple[str, int], ModuleCall], Any]:
    """The inputs and outputs of every module call in one process, and the result of `run`."""
    calls: dict[tuple[str, int], ModuleCall] = {}

    def ended(name: str, number: int, inputs: dict[str, Tensor], output: Any) -> None:
        calls[name, number].outputs.extend(tensor.detach().clone() for tensor in all_tensors_in(output))

    def began(name: str, number: int, inputs: dict[str, Tensor]) -> None:
        # Copies, as models write into tensors.
        calls[name, number] = ModuleCall({each: tensor.detach().clone() for each, tensor in inputs.items()}, [])

    with ModuleWatch(model, ended, began):
        return calls, run()
