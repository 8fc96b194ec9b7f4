"""The hooks that change the arguments and outputs of a module, each as its plan word says."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...cp_plans.plan import InputPlan, ParamId
from ...errors import AttentionProviderError
from ...nested import describe, like, updated
from .find_argument import argument_of, as_param
from .plan_words import ARGUMENTS, find, not_understood, words_in
from .within import check_called
from .words.base import ArgumentHook, Place, SetHook
from .words.conditions import Unchanged


def hooks(place: Place, spec: InputPlan) -> Iterator[SetHook]:
    """The hooks of an entry that is a dict of arguments.

    Raises:
        AttentionProviderError: it has something else than words for arguments, or names an argument that the module's
            forward does not have.
    """
    inputs: list[tuple[str | None, int | None, ArgumentHook]] = []
    outputs: list[tuple[ParamId, ArgumentHook]] = []
    for key, each in spec.items():
        words = words_in(each)
        kinds = [find(ARGUMENTS, word) for word in words]
        if not words or None in kinds:
            raise not_understood(place.path, spec)
        hook, param = _hook_of(each, place), as_param(key)
        if kinds[0].is_for_output(words[0]):  # type: ignore[union-attr]
            outputs.append((param, hook))
        else:
            inputs.append((*argument_of(place.module, place.path, param), hook))
    if inputs:
        yield functools.partial(place.module.register_forward_pre_hook, _ChangeInputs(place, inputs), with_kwargs=True)
    if outputs:
        yield functools.partial(place.module.register_forward_hook, _ChangeOutputs(place, outputs))


def _hook_of(spec: Any, place: Place) -> ArgumentHook:
    if isinstance(spec, (list, tuple)):
        return _ChangeElements(spec, place)
    if isinstance(spec, Mapping):
        return _ChangeValues(spec, place)
    kind = Unchanged if spec is None else find(ARGUMENTS, spec)
    assert kind is not None  # `hooks` has checked all words
    return kind(spec, place)


class _ChangeElements(ArgumentHook):
    """Changes each element of a list or tuple by a word of its own."""

    accepts = "a list or tuple of as many elements"

    def __init__(self, spec: Sequence[Any], place: Place) -> None:
        super().__init__(spec, place)
        self.hooks = [_hook_of(each, place) for each in spec]

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.hooks):
            raise self.not_accepted(value, what)
        return like(value, [hook.apply(each, f"{what}[{i}]") for i, (each, hook) in enumerate(zip(value, self.hooks))])


class _ChangeValues(ArgumentHook):
    """Changes each value of a dict by a word of its own. Keys that a dict lacks are ignored."""

    accepts = "a dict"

    def __init__(self, spec: Mapping[str, Any], place: Place) -> None:
        super().__init__(spec, place)
        self.hooks = {name: _hook_of(each, place) for name, each in spec.items()}

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        if not isinstance(value, Mapping):
            raise self.not_accepted(value, what)
        given = {name: hook for name, hook in self.hooks.items() if name in value}
        return updated(value, {name: hook.apply(value[name], f"{what}.{name}") for name, hook in given.items()})


class _ChangeInputs:
    """A forward pre-hook that changes arguments. Each has a name, a position and a hook."""

    def __init__(self, place: Place, arguments: list[tuple[str | None, int | None, ArgumentHook]]) -> None:
        self.tracker = place.tracker
        self.path = place.path
        self.arguments = arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_called(self, module)
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, index, hook in self.arguments:
            if name is not None and name in new_kwargs:
                new_kwargs[name] = hook.apply(new_kwargs[name], name)
            elif index is not None and index < len(new_args):
                new_args[index] = hook.apply(new_args[index], name or f"argument {index}")
            elif hook.needs_value:
                hook.apply(None, name or f"argument {index}")
        return tuple(new_args), new_kwargs


class _ChangeOutputs:
    """A forward hook that changes outputs."""

    def __init__(self, place: Place, outputs: list[tuple[ParamId, ArgumentHook]]) -> None:
        self.tracker = place.tracker
        self.path = place.path
        self.outputs = outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        check_called(self, module)
        for param, hook in self.outputs:
            what = f"output {param}"
            if isinstance(output, Tensor) and param.index in (0, -1, None):
                output = hook.apply(output, what)
            elif isinstance(output, Mapping):
                name = param.name if param.name is not None else list(output)[param.index or 0]
                output = updated(output, {name: hook.apply(output[name], what)})
            elif (
                isinstance(output, (list, tuple))
                and param.index is not None
                and -len(output) <= param.index < len(output)
            ):
                items = list(output)
                items[param.index] = hook.apply(items[param.index], what, outputs=items)
                output = like(output, items)
            else:
                raise AttentionProviderError(f"'{self.path}' has no {what}: it returned {describe(output)}.")
        return output
