"""The models to verify, with inputs of their forward."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...cp_plans.plan import Plan
from ...cp_plans.registry import get_cp_plan, list_cp_plans, uncovered
from ...cp_plans.uncovered import UNCOVERED
from ...errors import AttentionProviderError
from ...safetensors_only import from_safetensors
from ...tiny_models import CASES
from ..names import one_class

FUNCTION = "case"
"""Name of the function of a Python file, where none is given."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any] | Sequence[Any]
    plan: Plan | None
    """None: the plan that is registered for the model's class."""


def cases_of(target: str, call: Mapping[str, Any]) -> Iterator[Comparison]:
    """The comparisons that a target stands for.

    Args:
        target: a model class; a folder with a pipeline; or a Python file, with the name of a function after a colon.
        call: arguments for the call of a pipeline, such as its height. Those that a pipeline does not take are an
            error.

    Raises:
        AttentionProviderError: the target is none of these, or has no plan.
    """
    path, _, function = target.rpartition(":") if ".py:" in target else (target, "", FUNCTION)
    if Path(path).suffix == ".py":
        yield _of_file(Path(path), function)
    elif Path(path).is_dir():
        yield from _of_folder(Path(path), call)
    elif "/" in target or Path(path).exists():
        raise AttentionProviderError(
            f"{target} is no folder and no Python file. Accepted are a model class, a folder with a pipeline "
            "(model_index.json), and FILE.py:FUNCTION."
        )
    else:
        yield from _of_class(target)


def _of_class(target: str) -> Iterator[Comparison]:
    """Tiny models of a class, with random weights."""
    name = one_class(target, [*list_cp_plans(), *UNCOVERED])
    if name in UNCOVERED:
        raise AttentionProviderError(str(uncovered(type(name, (), {})())))
    for case in CASES.values():
        if case.model_class == name:
            yield Comparison(f"{name} ({case.name})", case.build(), case.inputs(), None)


def _of_file(path: Path, function: str) -> Comparison:
    """What a function of a Python file returns: (model, inputs) or (model, inputs, plan)."""
    if not path.is_file():
        raise AttentionProviderError(f"there is no file {path}.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the processes of the comparison import the model's class from it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        raise AttentionProviderError(
            f"{path} has no function {function}(). It must return (model, inputs) or (model, inputs, plan). To use a "
            f"function of another name, give {path}:NAME."
        )
    found = made()
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
        raise AttentionProviderError(
            f"{function}() of {path} returned {type(found).__name__}; (model, inputs) or (model, inputs, plan) is "
            "accepted, with a torch.nn.Module and the arguments of its forward as a dict or a tuple."
        )
    model, inputs, plan = (*found, None)[:3]
    return Comparison(f"{type(model).__name__} of {path.name}", model, inputs, plan)


def _of_folder(path: Path, call: Mapping[str, Any]) -> Iterator[Comparison]:
    """The transformers of a pipeline, with the inputs that the pipeline gives them."""
    if not (path / "model_index.json").is_file():
        raise AttentionProviderError(
            f"{path} has no model_index.json, so that it is not a pipeline's folder. A model alone has no inputs: give "
            "its pipeline, its class, or FILE.py:FUNCTION with a function that returns (model, inputs)."
        )
    from diffusers import DiffusionPipeline

    pipeline = from_safetensors(DiffusionPipeline, path)
    pipeline.set_progress_bar_config(disable=True)
    models = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and any(cls.__name__ in list_cp_plans() for cls in type(component).__mro__)
    }
    if not models:
        raise AttentionProviderError(f"no model of the {type(pipeline).__name__} in {path} has a plan.")
    for name, model in models.items():
        inputs = _inputs_in(pipeline, model, call)
        if inputs is None:
            raise AttentionProviderError(
                f"one step of {type(pipeline).__name__} did not call its {name} ({type(model).__name__}), so that "
                "there are no inputs for it. Write a function that returns (model, inputs), and give FILE.py:FUNCTION."
            )
        get_cp_plan(model)
        yield Comparison(f"{name} ({type(model).__name__}) of {path.name}", model, inputs, None)


class _FirstCallError(Exception):
    """Ends a pipeline at the first call of the model, whose arguments it has."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _inputs_in(pipeline: Any, model: nn.Module, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments by name with which a pipeline calls its model first; None if it does not call it."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCallError({**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs})

    accepted = inspect.signature(type(pipeline).__call__).parameters
    unknown = [name for name in call if name not in accepted]
    if unknown:
        raise AttentionProviderError(
            f"{type(pipeline).__name__} takes no {', '.join(unknown)}. It takes: {', '.join(list(accepted)[1:])}."
        )
    defaults = {"prompt": "a cat", "num_inference_steps": 1, "output_type": "latent"}
    arguments = {name: value for name, value in defaults.items() if name in accepted} | dict(call)
    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    run: Callable[..., Any] = pipeline
    try:
        run(**arguments)
    except _FirstCallError as found:
        return found.arguments
    except Exception as error:
        raise AttentionProviderError(
            f"{type(pipeline).__name__} could not be called with {arguments}: {type(error).__name__}: {error}. Give "
            "the options that it needs, or FILE.py:FUNCTION with a function that returns (model, inputs)."
        ) from error
    finally:
        handle.remove()
    return None
