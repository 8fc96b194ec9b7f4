"""Finds the models to split, in a pipeline or under wrappers, checks them, and counts their heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..context_parallel.hooks import copies, diffusers_hooks
from ..context_parallel.hooks.apply import applied_tracker
from ..context_parallel.hooks.submodules import submodules
from ..cp_plans.advanced import CPHeads
from ..cp_plans.plan import CPAttention, Plan, entries
from ..cp_plans.registry import get_cp_plan, list_cp_plans, uncovered
from ..errors import AttentionProviderError
from ..processors.binding import attention_modules_of, check_bindable
from ..processors.bound import obstacle


class Target(NamedTuple):
    """A model to split, with its plan."""

    name: str
    """Name of the pipeline's component, with its class; for a single model, its class."""
    model: nn.Module
    plan: Plan
    called: nn.Module | None = None
    """The wrapper of torch.compile within which it is called, if there is one."""


def find_targets(pipeline_or_model: Any, plan: Plan | None) -> tuple[list[Target], list[str]]:
    """The models to split, and the names of the pipeline's transformers without a plan.

    Raises:
        AttentionProviderError: there is nothing to split, a model is split already, or attention of a model cannot be
            bound to a provider.
    """
    unsplit: list[str] = []
    if isinstance(pipeline_or_model, nn.Module):
        model = unwrapped(pipeline_or_model)
        given = get_cp_plan(model) if plan is None else plan
        targets = [Target(type(model).__name__, model, given, _compiled_wrapper(pipeline_or_model))]
    else:
        targets, unsplit = _of_pipeline(pipeline_or_model, plan)
    for target in targets:
        if applied_tracker(target.model) is not None:
            raise AttentionProviderError(
                f"{target.name} is split between ranks already. To change that, call disable_context_parallel first "
                "(or remove_context_parallel, if apply_context_parallel split it)."
            )
        copies.check_not_split(target.model)
        check_bindable(target.model)
        if getattr(target.model, "_parallel_config", None) is not None:
            raise AttentionProviderError(
                f"diffusers' own enable_parallelism() was called on {target.name}. Load the model again without that "
                "call (or from_pretrained's parallel_config=...)."
            )
        _check_routed(target)
        diffusers_hooks.check(target.model, target.plan)
    return targets, unsplit


def models_of(pipeline_or_model: Any) -> list[nn.Module]:
    """The model, or the models of the pipeline, each once and without wrappers.

    Raises:
        AttentionProviderError: the argument is neither a model nor a pipeline.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return [unwrapped(pipeline_or_model)]
    models = map(unwrapped, _models(_components(pipeline_or_model)).values())
    return list({id(model): model for model in models}.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without the wrappers of torch.compile, PEFT and data parallelism. Its own hooks still run inside them."""
    return list(_layers(model))[-1]


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is compiled as a whole: by its `compile`, or within the wrapper that `torch.compile` returns."""
    return any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in _layers(model))


def _compiled_wrapper(model: nn.Module) -> nn.Module | None:
    return next((each for each in _layers(model) if hasattr(each, "_orig_mod")), None)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of a model, from the outermost to the model itself."""
    while True:
        yield model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return


def device_type(pipeline_or_model: Any) -> str:
    """Device type of the computation, such as "cuda"."""
    return device_of(pipeline_or_model).type


def device_of(pipeline_or_model: Any) -> torch.device:
    """Device of the computation. With offloading, the weights may be elsewhere."""
    if isinstance(pipeline_or_model, nn.Module):
        hook = getattr(pipeline_or_model, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        tensor = next(pipeline_or_model.parameters(), None)
        return torch.device(device) if device is not None else tensor.device if tensor is not None else _CPU
    device = getattr(pipeline_or_model, "_execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((device_of(model) for model in models_of(pipeline_or_model)), _CPU)


_CPU = torch.device("cpu")


def split_heads(target: Target) -> tuple[int, ...]:
    """The distinct numbers of heads of the attention that is split; with grouped heads, numbers of key heads."""
    found = {spec.heads for _, spec in entries(target.plan) if isinstance(spec, CPHeads)}
    return tuple(sorted(found | {min(heads, kv_heads) for _, _, heads, kv_heads in split_attention(target)}))


def split_attention(target: Target) -> Iterator[tuple[str, Any, int, int]]:
    """The attention modules that are split: name, module, number of query heads and of key heads."""
    local = _local(target)
    for name, module in attention_modules_of(target.model):
        heads = _number(module, "heads", "num_heads", "num_attention_heads")
        if heads is not None and id(module) not in local:
            inner: Any = getattr(module, "inner_dim", None) or 1
            inner_kv: Any = getattr(module, "inner_kv_dim", None) or inner
            kv_heads = _number(module, "kv_heads", "num_kv_heads", "num_key_value_heads")
            yield name, module, heads, heads * inner_kv // inner if kv_heads is None else kv_heads


def _number(module: Any, *names: str) -> int | None:
    """The first of these attributes that is a number. diffusers' classes use different names."""
    return next((value for value in (getattr(module, name, None) for name in names) if isinstance(value, int)), None)


def _components(pipeline: Any) -> dict[str, Any]:
    components = getattr(pipeline, "components", None)
    if components is None:
        raise AttentionProviderError(
            f"got a {type(pipeline).__name__}; a model (torch.nn.Module) or a diffusers pipeline is accepted."
        )
    return dict(components)


def _models(components: dict[str, Any]) -> dict[str, nn.Module]:
    """The models of a pipeline by name. Several ControlNets in one component follow it."""
    found: dict[str, nn.Module] = {}
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        found[name] = component
        nets = getattr(unwrapped(component), "nets", None)
        if isinstance(nets, nn.ModuleList):
            found |= {f"{name}.nets.{number}": each for number, each in enumerate(nets)}
    return found


def _of_pipeline(pipeline: Any, plan: Plan | None) -> tuple[list[Target], list[str]]:
    targets: dict[int, Target] = {}
    unsplit: list[str] = []
    components = _components(pipeline)
    for name, component in _models(components).items():
        model = unwrapped(component)
        transformer = name == "transformer" or name.startswith("transformer_")
        found = plan if plan is not None and transformer else None if plan is not None else _registered(model)
        if found is not None:
            title = f"{name} ({type(model).__name__})"
            targets.setdefault(id(model), Target(title, model, found, _compiled_wrapper(component)))
        elif transformer:
            unsplit.append(f"{name} ({type(model).__name__})")
    if not targets:
        reasons = "".join(f"{reason} " for reason in map(uncovered, components.values()) if reason is not None)
        raise AttentionProviderError(
            f"{type(pipeline).__name__} has no component with a plan. Its components are "
            f"{', '.join(f'{name} ({type(each).__name__})' for name, each in components.items())}; "
            f"diffusers_attn.list_cp_plans() lists the classes with a plan. {reasons}To write one, see "
            "docs/writing_plans.md; then pass plan=..., or register it for the transformer's class (register_cp_plan)."
        )
    classes = {type(target.model).__name__ for target in targets.values()}
    if plan is not None and len(classes) > 1:
        raise AttentionProviderError(
            f"one plan was given, but {type(pipeline).__name__} has transformers of {len(classes)} classes, "
            f"{', '.join(sorted(classes))}. Register a plan for each class, or enable the models one by one."
        )
    return list(targets.values()), unsplit


def _registered(model: nn.Module) -> Plan | None:
    known = set(list_cp_plans())
    return get_cp_plan(model) if any(cls.__name__ in known for cls in type(model).__mro__) else None


def _local(target: Target) -> set[int]:
    """Ids of the attention modules whose keys are replicated on every rank."""
    return {
        id(module)
        for path, spec in entries(target.plan)
        if isinstance(spec, CPAttention) and (spec.key == () or not spec.query)
        for module in submodules(target.model, path)
    }


def _check_routed(target: Target) -> None:
    """Raises AttentionProviderError if some attention would see only one rank's tokens."""
    local = _local(target)
    for name, module in attention_modules_of(target.model):
        reason = obstacle(module.processor)
        if reason is not None and id(module) not in local:
            raise AttentionProviderError(
                f"the attention of '{name}' in {target.name} cannot be split between ranks: {reason}. If its own "
                "processor was replaced (by attention slicing, xformers or set_default_attn_processor), restore it; if "
                "its keys are replicated on every rank, declare that in the plan: CPAttention((...), key=())."
            )
