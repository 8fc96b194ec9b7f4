"""Binds or unbinds all attention of a model or pipeline, and lists a model's attention modules."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..errors import AttentionProviderError
from ..providers.catalog import AttentionProvider
from .binding import attention_modules_of, bind_model, check_bindable, unbind_model
from .bound import BoundProcessor, obstacle, unbind
from .dispatch import DispatchProcessor

# Modules of diffusers whose models a pipeline runs at every step. Models that run once (text and image encoders,
# autoencoders, connectors) take little time, and often have heads or masks that fast kernels do not support.
_DENOISERS = ("diffusers.models.transformers.", "diffusers.models.unets.", "diffusers.models.controlnets.")


def set_attention_provider(target: Any, provider: str | AttentionProvider | None, **options: object) -> None:
    """Routes all attention of a model, or of a pipeline's denoising models, through a provider.

    Args:
        target: a diffusers model, which may be compiled or inside a PEFT model; or a pipeline, whose transformers,
            UNets and ControlNets are bound. Pass autoencoders and encoders as models.
        provider: name of a provider. None undoes this function and `DispatchProcessor`, and restores the modules' own
            processors.
        options: options of the provider's kernel; and `source="hub"`, as for `attention_provider`.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine; the message says how to install it.
        AttentionProviderError: the provider or an option is unknown, or nothing in `target` can be bound. Nothing has
            changed then.
    """
    models = [target] if isinstance(target, nn.Module) else _denoisers(target)
    if provider is None:
        for model in models:
            _check_unbindable(model)
        for model in models:
            unbind_model(model)
        return
    request = DispatchProcessor(provider, **options)
    for model in models:
        check_bindable(model, request.choice)
    for model in models:
        bind_model(model, request)


def _check_unbindable(model: nn.Module) -> None:
    """Raises AttentionProviderError if a plan splits the model's tokens, which diffusers' attention would ignore."""
    from ..context_parallel.hooks.apply import applied_tracker

    if any(applied_tracker(each) is not None for each in model.modules()):
        raise AttentionProviderError(
            f"set_attention_provider(..., None) restores diffusers' attention, but the tokens of this "
            f"{type(model).__name__} are split between ranks: each rank would attend only to its own. Call "
            "disable_context_parallel first, which also restores the processors that enable_context_parallel bound "
            "(or remove_context_parallel, after apply_context_parallel). For another provider, give its name."
        )


def _denoisers(pipeline: Any) -> list[nn.Module]:
    components = getattr(pipeline, "components", None)
    if components is None:
        raise AttentionProviderError(
            f"set_attention_provider was given a {type(pipeline).__name__}; a model (torch.nn.Module) or a diffusers "
            "pipeline is accepted."
        )
    models = [
        model
        for name, model in components.items()
        if isinstance(model, nn.Module) and any(attention_modules_of(model)) and _denoises(name, model)
    ]
    if not models:
        raise AttentionProviderError(
            f"{type(pipeline).__name__} has no transformer, UNet or ControlNet with attention modules; its components "
            f"are {', '.join(components)}. Pass one of its models to set_attention_provider."
        )
    return models


def _denoises(name: str, model: nn.Module) -> bool:
    # The component's name decides if the model's class is defined outside of diffusers.
    return name in ("transformer", "unet") or any(cls.__module__.startswith(_DENOISERS) for cls in type(model).__mro__)


@dataclasses.dataclass(frozen=True)
class AttentionModule:
    """An attention module of a model, and the provider of its attention."""

    name: str
    processor: str
    """Name of its processor's class."""
    provider: str | None
    """Name of the provider it is bound to; "scope" if it follows the scope, None if it is not bound."""
    obstacle: str | None
    """Reason why it cannot be bound; None if it can."""


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """Lists the attention modules of `model` in order, each with its provider or the reason why it cannot be bound.

    Attention without a processor, such as attention pooling, is not listed.
    """
    return [
        AttentionModule(
            name=name,
            processor=type(unbind(module.processor)).__name__,
            provider=_provider_of(module.processor),
            obstacle=obstacle(module.processor),
        )
        for name, module in attention_modules_of(model)
    ]


def _provider_of(processor: Any) -> str | None:
    if not isinstance(processor, BoundProcessor):
        return None
    return processor.choice.provider if processor.choice else "scope"
