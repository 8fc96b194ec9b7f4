"""The components whose weights are sharded, and reasons against it. Nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...context_parallel.hooks.diffusers_hooks.registry import class_name, hooks_in
from ...errors import AttentionProviderError
from ...runtime.cuda_graphs.apply import is_applied_by_hand
from ..model_sync import described_model
from ..targets import device_type, is_compiled, unwrapped
from .loading import is_on_meta
from .units import Unit, adapter_weights, units

ShardWeights = bool | Iterable[str]


class ToShard(NamedTuple):
    """A model whose weights will be sharded."""

    name: str
    """Name of the pipeline's component; for a single model, its class."""
    model: nn.Module
    units: list[Unit]
    is_compiled: bool
    """Whether it is compiled as a whole."""


def models_to_shard(pipeline_or_model: Any, shard_weights: ShardWeights, cuda_graphs: object) -> list[ToShard]:
    """The models that `shard_weights` names.

    Raises:
        AttentionProviderError: a name is not accepted, or weights of a model cannot be sharded.
    """
    if shard_weights is False:
        return []
    if shard_weights is not True and (
        isinstance(shard_weights, (str, nn.Module))
        or not isinstance(shard_weights, Iterable)
        or not all(isinstance(name, str) for name in shard_weights)
    ):
        raise AttentionProviderError(
            f"shard_weights={shard_weights!r}: accepted are True, False, and names of the pipeline's components, such "
            'as ("transformer", "text_encoder").'
        )
    names = None if shard_weights is True else tuple(shard_weights)
    if isinstance(pipeline_or_model, nn.Module):
        model = unwrapped(pipeline_or_model)
        possible = {
            type(model).__name__: ToShard(type(model).__name__, model, units(model), is_compiled(pipeline_or_model))
        }
        others: dict[str, nn.Module] = {}
        if names is not None:
            raise AttentionProviderError(
                f"shard_weights={names!r} names components of a pipeline, but a {type(model).__name__} was given. "
                "Accepted are True and False."
            )
    else:
        possible, others = _of_pipeline(pipeline_or_model)
    unknown = [name for name in names or () if name not in possible]
    if unknown or names == () or not possible:
        problem = f"{', '.join(map(repr, unknown))} cannot be sharded" if unknown else "there is nothing to shard"
        raise AttentionProviderError(
            f"shard_weights={shard_weights!r}: {problem}. Accepted are True, False, and names among "
            f"{', '.join(map(repr, possible)) or '(none)'}: components with repeated blocks that are no autoencoders."
        )
    if cuda_graphs is True:
        raise AttentionProviderError(
            "cuda_graphs=True does not combine with shard_weights: weights are gathered into new memory in every "
            "forward, and a CUDA graph would read them where they were. Leave out one of the two."
        )
    chosen = [each for name, each in possible.items() if names is None or name in names]
    for each in chosen:
        _check(each)
    remaining = others | {name: each.model for name, each in possible.items() if each not in chosen}
    for name, module in remaining.items():
        if is_on_meta(module):
            raise AttentionProviderError(
                f"{name} ({type(module).__name__}) is on the meta device, and its weights are not sharded. Load "
                "it into CPU memory, or name it in shard_weights."
            )
    return chosen


def facts_of(chosen: Iterable[ToShard], check_weights: bool) -> dict[str, str]:
    """Properties of these models that must be equal on all ranks, by name."""
    facts: dict[str, str] = {}
    for each in chosen:
        memory = "on the meta device" if is_on_meta(each.model) else "loaded"
        found = {"its weights": memory, **described_model(each.model, check_weights)}
        facts |= {f"{each.name}, sharded: {name}": value for name, value in found.items()}
    return facts


def others(pipeline_or_model: Any, chosen: Iterable[ToShard]) -> list[nn.Module]:
    """The pipeline's other models."""
    sharded = {id(each.model) for each in chosen}
    components = {} if isinstance(pipeline_or_model, nn.Module) else pipeline_or_model.components
    return [each for each in components.values() if isinstance(each, nn.Module) and id(unwrapped(each)) not in sharded]


def device_to_use(pipeline_or_model: Any, mesh: DeviceMesh | None, shard_weights: ShardWeights) -> str:
    """Device type of the computation. Weights that are to be sharded may be in CPU memory or on the meta device: then
    it is that of the mesh, or the machine's accelerator if the job can use it."""
    now = device_type(pipeline_or_model)
    if shard_weights is False or now not in ("cpu", "meta"):
        return now
    if mesh is not None and isinstance(mesh, DeviceMesh):
        return mesh.device_type
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    backends = dist.get_backend_config(dist.group.WORLD) if dist.is_initialized() else f"{accelerator.type}:"
    if f"{accelerator.type}:" not in backends or f"{accelerator.type}:gloo" in backends:  # gloo: a job on CPUs
        return "cpu"
    return accelerator.type


def _of_pipeline(pipeline: Any) -> tuple[dict[str, ToShard], dict[str, nn.Module]]:
    """The components that can be sharded, and all other models."""
    possible: dict[str, ToShard] = {}
    remaining: dict[str, nn.Module] = {}
    for name, component in getattr(pipeline, "components", {}).items():
        if isinstance(component, nn.Module):
            model = unwrapped(component)
            found = [] if hasattr(model, "decode") else units(model)  # autoencoders have it
            if any(id(each.model) == id(model) for each in possible.values()):
                continue
            if any(each.next is not None for each in found):
                possible[name] = ToShard(name, model, found, is_compiled(component))
            else:
                remaining[name] = model
    return possible, remaining


def _check(chosen: ToShard) -> None:
    """Raises AttentionProviderError if weights of this model cannot be sharded."""
    name, model = f"{chosen.name} ({type(chosen.model).__name__})", chosen.model
    for path, weight in model.named_parameters():
        if type(weight) not in (nn.Parameter, Tensor):
            raise AttentionProviderError(
                f"the weights of {name} cannot be sharded: '{path}' is a {type(weight).__name__}, and only plain "
                "tensors are sharded. Load the model again, without quantization and without FSDP, or leave it out "
                "of shard_weights."
            )
    if is_applied_by_hand(model):
        raise AttentionProviderError(
            f"{name} records CUDA graphs, which would read gathered weights where they were in another forward. Call "
            "remove_cuda_graphs(model) first, or leave it out of shard_weights."
        )
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise _moved(name, f"Accelerate's {type(module._hf_hook).__name__} on '{path}'")
    if chosen.is_compiled:
        raise AttentionProviderError(
            f"{name} is compiled as a whole, and weights are gathered between its blocks. Compile its blocks: "
            'apply_compile(model, "regional").'
        )
    for path, _, hook in hooks_in(model):
        if any(part in class_name(hook) for part in (".group_offloading.", ".layerwise_casting.LayerwiseCasting")):
            raise _moved(name, f"diffusers' {type(hook).__name__} on '{path}'")
    if is_on_meta(model) and adapter_weights(model):
        raise AttentionProviderError(
            f"{name} is on the meta device and has adapters. Load them after enable_context_parallel, or load the "
            "model into CPU memory."
        )


def _moved(name: str, what: str) -> AttentionProviderError:
    return AttentionProviderError(
        f"the weights of {name} cannot be sharded, since {what} moves or casts them. Offloading and layerwise casting "
        "do not combine with shard_weights: leave out one of the two (pipe.remove_all_hooks() takes Accelerate's off)."
    )
