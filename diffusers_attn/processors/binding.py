"""Patches diffusers' attention modules and models, so that processors can be bound and stay bound.

`install` applies all patches, when the first processor is bound. (`entry_points.py` has the functions that bound
processors call.)
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..errors import AttentionProviderError
from ..scope import ProviderChoice, active_choice
from . import backend_scope
from .bound import BoundProcessor, before_first_binding, bind, obstacle, unbind
from .dispatch import DispatchProcessor
from .entry_points import backend_refused, parallelism_refused
from .requests import BACKEND, check_requests, is_flex

ATTENTION_CLASSES = (Attention, AttentionModuleMixin, MochiAttention)

# Attribute of a module with the choice that it is bound to. The choice in the processor does not suffice: the processor
# may temporarily be one that cannot be bound (attention slicing), or one assigned directly to `module.processor`
# (perturbed attention guidance). The next processor that diffusers sets must then be bound again.
_CHOICE = "_attention_provider_choice"

# Functions between `set_processor` and the caller that sets a processor.
_SETTERS = {"set_attn_processor", "fn_recursive_attn_processor", "set_processor"}


@functools.cache  # once
def install() -> None:
    """Patches diffusers' attention modules and models so that they accept a `DispatchProcessor`.

    Nothing changes for modules on which none is set. Further calls do nothing.
    """
    backend_scope.install()
    for has_setter in (Attention, AttentionModuleMixin):
        _patch(has_setter, set_processor=_binding(has_setter.set_processor))
    _patch(MochiAttention, set_processor=Attention.set_processor, get_processor=Attention.get_processor)
    _patch(AttentionMixin, set_attn_processor=_requesting(AttentionMixin.set_attn_processor))
    # A third of the model classes have attention modules, but not the mixin with these two methods.
    _patch(ModelMixin, **{name: vars(AttentionMixin)[name] for name in ("set_attn_processor", "attn_processors")})
    _patch(ModelMixin, set_attention_backend=_checking(ModelMixin.set_attention_backend))
    _patch(ModelMixin, enable_parallelism=_refusing(ModelMixin.enable_parallelism))
    # Some classes define set_attn_processor themselves: patch those imported so far, and later ones on creation.
    for cls in _subclasses(ModelMixin):
        _adopt(cls)
    _patch(ModelMixin, __init_subclass__=classmethod(_adopting_init_subclass))


before_first_binding(install)


def _patch(cls: type, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(cls, name, value)


def _subclasses(cls: type) -> Iterator[type]:
    each: type
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _adopt(cls: type) -> None:
    """Patches the set_attn_processor that a model class of diffusers defines. Classes of other libraries are left."""
    own = vars(cls).get("set_attn_processor")
    if own is not None and cls.__module__.startswith("diffusers."):
        _patch(cls, set_attn_processor=_requesting(own))


def _adopting_init_subclass(cls: Any, /, **kwargs: Any) -> None:
    super(ModelMixin, cls).__init_subclass__(**kwargs)
    _adopt(cls)


def _binding(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def set_processor(self: nn.Module, processor: Any) -> None:
        upstream(self, _placed(self, processor))

    return set_processor


def _placed(module: nn.Module, processor: Any) -> Any:
    """The processor to store in `module` when `processor` is set on it.

    When diffusers sets a plain processor, attention changes its form (fused projections, IP-Adapter, KV cache, and
    back) but not its provider: a bound module stays bound, an unbound one unbound. A processor set by other code ends
    the binding.
    """
    state = vars(module)
    if isinstance(processor, DispatchProcessor):
        choice, processor = processor.choice, getattr(module, "processor", None)
        reason = obstacle(processor)
        if reason is not None:
            raise AttentionProviderError(f"{type(module).__name__} cannot be bound to an attention provider: {reason}.")
        check_requests(None, [processor], choice)
    elif _CHOICE not in state and not isinstance(processor, BoundProcessor):
        return processor
    elif _set_by_diffusers():
        if _CHOICE not in state:
            return unbind(processor)
        choice = state[_CHOICE]
        reason = obstacle(processor)
        if reason is not None:
            provider = f"provider '{choice.provider}'" if choice else "the scope's provider"
            warnings.warn(f"{reason}. While this processor is set, attention does not use {provider}.", stacklevel=3)
    elif isinstance(processor, BoundProcessor):
        choice = processor.choice
    else:
        del state[_CHOICE]
        return processor
    state[_CHOICE] = choice
    return bind(processor, choice)


def is_bound(module: nn.Module) -> bool:
    """Whether `module` is bound, even if diffusers has set a processor on it that cannot be bound."""
    return _CHOICE in vars(module)


def change_processor(state: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Replaces the processor by `change(processor)` in an attention module's state for copy and pickle."""
    if "processor" not in state:  # the processor is an nn.Module
        state["_modules"] = dict(state["_modules"])
    holder = state if "processor" in state else state["_modules"]
    holder["processor"] = processor = change(holder["processor"])
    state.pop(_CHOICE, None)
    if isinstance(processor, BoundProcessor):
        state[_CHOICE] = processor.choice


def _set_by_diffusers() -> bool:
    """Whether diffusers' own code sets the processor, judged by the calling frame.

    The alternative, patching every function of diffusers that sets processors, would miss new ones.
    `set_default_attn_processor` counts as the user's code, since users call it to remove other processors.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_globals is globals() or frame.f_code.co_name in _SETTERS):
        frame = frame.f_back
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package == "diffusers" and frame.f_code.co_name != "set_default_attn_processor"


def _requesting(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def set_attn_processor(self: nn.Module, processor: Any) -> None:
        if isinstance(processor, DispatchProcessor):
            bind_model(self, processor)
        elif isinstance(processor, dict):
            upstream(self, _without_obstacles(self, processor))
        else:
            upstream(self, processor)

    return set_attn_processor


def _without_obstacles(model: Any, processors: dict[str, Any]) -> dict[str, Any]:
    """A copy of `processors` in which modules that cannot be bound keep their own. (Upstream empties the dict.)"""
    # `attn_processors` alone does not suffice: HunyuanDiT2DControlNetModel defines one that returns None values.
    current: dict[str, Any] = dict(model.attn_processors)
    current |= {f"{name}.processor": module.processor for name, module in attention_modules_of(model)}
    requested = [name for name, each in processors.items() if isinstance(each, DispatchProcessor) and name in current]
    blocked = {name: current[name] for name in requested if obstacle(current[name])}
    if requested and len(blocked) == len(requested):
        raise _nothing_to_bind(model, blocked.values())
    return processors | blocked


def _checking(upstream: Callable[..., None]) -> Callable[..., None]:
    """Makes `set_attention_backend` raise on a bound model.

    diffusers stores a backend only in processors that support backends, and the others would keep using the provider.
    A backend that was set before is detected when the model is called (`entry_points.py`). Only "flex" is accepted, if
    every processor supports backends: their calls then use the provider of that name.
    """

    @functools.wraps(upstream)
    def set_attention_backend(self: nn.Module, backend: str) -> None:
        bound = _bound_in(self)
        accepted = is_flex(backend) and all(hasattr(each, BACKEND) for each in bound)
        if bound and not accepted:
            raise backend_refused(backend, active_choice(bound[0].choice))
        upstream(self, backend)

    return set_attention_backend


def _refusing(upstream: Callable[..., None]) -> Callable[..., None]:
    """Makes `enable_parallelism` raise on a model that is bound to a provider or split by this library."""

    @functools.wraps(upstream)
    def enable_parallelism(self: nn.Module, **options: Any) -> None:
        from ..context_parallel.hooks.apply import applied_tracker

        bound = _bound_in(self)
        if applied_tracker(self) is not None:
            raise AttentionProviderError(
                f"enable_parallelism() was called on a {type(self).__name__} that this library has split between "
                "ranks. Call disable_context_parallel(model) first (or remove_context_parallel, if "
                "apply_context_parallel split it), or leave enable_parallelism out."
            )
        if bound:
            raise parallelism_refused(active_choice(bound[0].choice))
        upstream(self, **options)

    return enable_parallelism


def _bound_in(model: nn.Module) -> list[BoundProcessor]:
    processors = [module.processor for _, module in attention_modules_of(model)]
    return [processor for processor in processors if isinstance(processor, BoundProcessor)]


def attention_modules_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of `model` that have an attention processor, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ATTENTION_CLASSES) and getattr(module, "processor", None) is not None:
            yield name, module


def check_bindable(model: nn.Module, choice: ProviderChoice | None = None) -> None:
    """Raises AttentionProviderError if no attention module of `model` can be bound, or if a setting of diffusers' own
    attention conflicts with the provider (`choice`; None: the active one)."""
    processors = [module.processor for _, module in attention_modules_of(model)]
    if all(map(obstacle, processors)):
        raise _nothing_to_bind(model, processors)
    check_requests(model, [each for each in processors if obstacle(each) is None], choice)


def bind_model(model: nn.Module, request: DispatchProcessor) -> None:
    """Binds every attention module of `model` that can be bound; see `check_bindable`."""
    install()
    check_bindable(model, request.choice)
    for _, module in attention_modules_of(model):
        if obstacle(module.processor) is None:
            module.set_processor(request)


def unbind_model(model: nn.Module) -> None:
    """Puts the original processors of `model` back."""
    for _, module in attention_modules_of(model):
        if is_bound(module) or isinstance(module.processor, BoundProcessor):
            module.set_processor(unbind(module.processor))


def _nothing_to_bind(model: nn.Module, processors: Iterable[Any]) -> AttentionProviderError:
    reasons = "; ".join(sorted({str(obstacle(processor)) for processor in processors})) or "it has no attention modules"
    return AttentionProviderError(
        f"no attention of {type(model).__name__} can be bound to a provider: {reasons}. If its own processors were "
        "replaced (by attention slicing, xformers or set_default_attn_processor), restore them first."
    )
