"""The classes of sharded models and units: they refuse operations that would be wrong on sharded weights.

Such a class is a subclass of the module's own class. It has the same name and equals it, since diffusers looks up
models and blocks by their classes and the names of these.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import AttentionProviderError
from ...tracing.errors import raise_error
from ...tracing.export import refuse_export
from .units import adapter_weights

_REMEDY = "Call disable_context_parallel on all ranks first, which gathers them."

REFUSED = {
    "save_pretrained": f"each rank would save its shard. {_REMEDY}",
    "fuse_lora": "adapters cannot be merged into shards. Leave them unfused: they are computed beside the weights.",
    "unfuse_lora": f"merged adapters cannot be taken out of shards. {_REMEDY}",
    "fuse_qkv_projections": "fused projections copy weights, of which a rank has a shard. Fuse them before "
    "enable_context_parallel.",
    "unfuse_qkv_projections": f"fused projections belong to the shards. {_REMEDY}",
    "resize_token_embeddings": "new tokens need the full embedding. Add them, and textual inversions, before "
    "enable_context_parallel.",
    "enable_group_offload": "offloading moves weights that the ranks gather. shard_weights alone saves the memory; or "
    "leave it out, and offload.",
    "enable_layerwise_casting": "it casts weights that the ranks gather. Leave shard_weights out, or this call.",
}
"""Methods of diffusers' and transformers' models that are errors while weights are sharded, with the reason."""


OF_MODELS = {"compile": 'weights are gathered between its blocks. Compile these: apply_compile(model, "regional").'}
"""The same for methods of a model that its blocks and layers keep."""
ADAPTING = ("load_lora_adapter", "add_adapter", "load_adapter")
"""Methods of these models that add adapters. They need the shapes of full weights."""


def _absent(self: object) -> NoReturn:
    raise AttributeError("_old_forward")


class ShardedModule:
    """Base class of sharded models and their units."""

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Called by `.to()`, `.cuda()`, `.half()` and the like, which may change neither device nor dtype."""
        for dtype, device in {(weight.dtype, weight.device) for weight in self.parameters()}:
            new = fn(torch.empty(0, dtype=dtype, device=device))
            if (new.dtype, new.device) != (dtype, device):
                raise AttentionProviderError(
                    f"the weights of this {type(self).__name__} are sharded over ranks (shard_weights), as "
                    f"{_name(dtype)} on {device}, and cannot become {_name(new.dtype)} on {new.device}. Offloading, "
                    "which moves weights, does not combine with shard_weights. To move or cast them, call "
                    "disable_context_parallel on all ranks first, which gathers them."
                )
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refusal(self, "copy or pickle", f"each rank would have a copy of its shard. {_REMEDY}")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__reduce_ex__(0)

    def _no_offloading(self: Any, value: object) -> NoReturn:
        raise _refusal(self, "offloading", REFUSED["enable_group_offload"])

    _old_forward = property(_absent, _no_offloading)  # Accelerate sets it when it offloads a model


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def class_for(
    fsdp_class: type[nn.Module], original: type[nn.Module], call: Callable[..., Any], is_model: bool
) -> type[nn.Module]:
    """The class of a sharded module.

    Args:
        fsdp_class: the class that FSDP2 gave to it, a subclass of `original`.
        original: its own class.
        call: runs the module: called with the module and a function that runs it as its own class would, and arguments.
        is_model: whether it is the sharded model itself.
    """
    if fsdp_class not in _classes:
        refused = REFUSED | (OF_MODELS if is_model else {})
        methods: dict[str, Any] = {
            name: _refusing(name, reason) for name, reason in refused.items() if hasattr(original, name)
        }
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        methods |= {name: _with_full_shapes(getattr(original, name)) for name in ADAPTING if hasattr(original, name)}
        methods["__call__"] = _calling(original, call, is_model)
        kind: Any = type("EqualClass", (_EqualClass, type(original)), {})
        made = kind(original.__name__, (ShardedModule, fsdp_class), methods | names)
        made.original = original
        _classes[fsdp_class] = made
    return _classes[fsdp_class]


class _EqualClass(type):
    """The type of classes that equal another class, `original`, also as keys of a dict."""

    original: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)


def _calling(original: type[nn.Module], call: Callable[..., Any], is_model: bool) -> Callable[..., Any]:
    plain = original.__call__

    @torch.compiler.disable(recursive=False)
    def outside_of_graphs(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(self, plain, args, kwargs)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        refuse_export(f"this {type(self).__name__}", "its weights are sharded", "Call disable_context_parallel")
        # A compiled block is compiled without this function.
        if is_model and torch.compiler.is_compiling():
            raise_error(_refusal, self, "compile", OF_MODELS["compile"])
        return outside_of_graphs(self, args, kwargs)

    return __call__


def _with_full_shapes(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def adding(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        known = set(adapter_weights(self))
        with _placeholders(self):
            result = method(self, *args, **kwargs)
        for key, weight in adapter_weights(self).items():
            if key not in known and weight.isnan().any():
                raise AttentionProviderError(
                    f"the new adapter of this {type(self).__name__} is initialised from the model's weights, of which "
                    "each rank has a shard (shard_weights). Add it before enable_context_parallel, and remove it now: "
                    "model.delete_adapters(name)."
                )
        return result

    return adding


@contextlib.contextmanager
def _placeholders(model: nn.Module) -> Iterator[None]:
    """Puts tensors of full shape, without memory, in the place of shards: PEFT would take the shape of the shard. They
    are NaN, so that no value can be taken for that of a weight."""
    places = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and type(weight.data) is not Tensor
    ]
    for module, name, weight in places:
        value = torch.full((), torch.nan if weight.is_floating_point() else 0, dtype=weight.dtype, device=weight.device)
        module._parameters[name] = nn.Parameter(value.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


def _refusing(name: str, reason: str) -> Callable[..., NoReturn]:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal(self, name, reason)

    return refused


def _refusal(module: Any, name: str, reason: str) -> AttentionProviderError:
    return AttentionProviderError(
        f"{name} of this {type(module).__name__} is not possible: its weights are sharded over ranks (shard_weights), "
        f"and {reason}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
