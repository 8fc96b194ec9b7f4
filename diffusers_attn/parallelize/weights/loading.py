"""Brings the weights of a model to this rank's device, a few modules at a time.

A model is in the same kind of memory on all ranks:

- In CPU memory, or on the device: each rank moves its own tensors. `from_pretrained` maps safetensors files into
  memory, so ranks of one machine share the pages of weights that it does not convert.
- On the meta device: the first rank loads the model with `from_pretrained` from the folder or repository that its
  configuration names, and sends each tensor to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import AttentionProviderError
from ...safetensors_only import from_safetensors
from ..fingerprint import bytes_of
from .units import dtype_of

Agree = Callable[[Any], list[Any]]
"""Gathers a value of this rank from all ranks."""


def is_on_meta(model: nn.Module) -> bool:
    """Whether some weights of `model` are on the meta device."""
    return any(weight.is_meta for weight in model.parameters())


class Mover:
    """Moves a model's own tensors.

    Args:
        device: this rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for weight in module._parameters.values():
                if weight is not None and weight.device != self._device:
                    weight.data = weight.data.to(self._device)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)


class Receiver:
    """Sends the tensors of the first rank's loaded model to all ranks, which have the model on the meta device.

    Args:
        model: the model on the meta device.
        loaded: the loaded model on the first rank, None on the others.
        device: this rank's device.
        group: the ranks.
        agree: see `Agree`.

    Raises:
        AttentionProviderError: the loaded model has other tensors.
    """

    def __init__(
        self, model: nn.Module, loaded: nn.Module | None, device: torch.device, group: dist.ProcessGroup, agree: Agree
    ) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._loaded, self._device, self._group, self._agree = loaded, device, group, agree
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        """Modules and names of each weight."""
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    self._places.setdefault(id(weight), []).append((module, name))
        described: dict[tuple[str, str], tuple[torch.Size, torch.dtype]] = {} if loaded is None else {
            (path, name): (tensor.shape, tensor.dtype)
            for path, module in loaded.named_modules()
            for name, tensor in _tensors(module)
        }  # fmt: skip
        self._described = next((each for each in agree(described) if each), described)
        for path, module in model.named_modules():
            for name, tensor in _tensors(module):
                found = self._described.get((path, name))
                if tensor.is_meta and (found is None or found[0] != tensor.shape):
                    in_files = "missing" if found is None else list(found[0])
                    raise AttentionProviderError(
                        f"'{path}.{name}' of this {type(model).__name__} on the meta device has the shape "
                        f"{list(tensor.shape)}, and in the files it is {in_files}. Build the model with the "
                        "configuration of the files, and add adapters after enable_context_parallel."
                    )

    def __call__(self, modules: Iterable[nn.Module]) -> None:
        pending: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        problem = None
        try:
            seen: set[int] = set()
            for module in modules:
                for name, tensor in _tensors(module):
                    if id(tensor) not in seen and (tensor.is_meta or tensor.device != self._device):
                        seen.add(id(tensor))
                        pending.append((module, name, tensor, self._value(module, name, tensor)))
        except Exception as error:  # every type, since the others must not wait for this rank
            problem = error
        check_all(problem, self._agree)
        for module, name, tensor, value in pending:
            if tensor.is_meta and value.numel():
                raw = bytes_of(value)
                dist.broadcast(raw, group=self._group, group_src=0)
            self._set(module, name, tensor, value)

    def _value(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """The tensor on the device: its values on the first rank, and memory for them on the others."""
        if not tensor.is_meta:
            return tensor.detach().to(self._device)
        path = self._paths[id(module)]
        if self._loaded is None:
            shape, dtype = self._described[path, name]
            return torch.empty(shape, dtype=dtype, device=self._device)
        value: Tensor = dict(_tensors(self._loaded.get_submodule(path)))[name]
        return value.detach().to(self._device).contiguous()

    def _set(self, module: nn.Module, name: str, tensor: Tensor, value: Tensor) -> None:
        if name in module._parameters:
            weight = nn.Parameter(value, requires_grad=tensor.requires_grad)
            for owner, place in self._places[id(tensor)]:
                owner._parameters[place] = weight
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, value)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors by name: weights, buffers, and other attributes (some position embeddings)."""
    own = (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
    return ((name, each) for name, each in own if isinstance(each, Tensor))


def check_all(problem: Exception | None, agree: Agree) -> None:
    """Raises an error on all ranks if one of them has a problem.

    Raises:
        AttentionProviderError: with this rank's problem, or that of the first rank that has one.
    """
    answers = agree((dist.get_rank(), None if problem is None else f"{type(problem).__name__}: {problem}"))
    if isinstance(problem, AttentionProviderError):
        raise problem
    for rank, answer in answers:
        if answer is not None:
            raise AttentionProviderError(
                f"rank {rank} could not shard its weights: {answer}. Weights may have been moved in part, so load the "
                "pipeline again before the next attempt."
            ) from problem


def load(model: nn.Module, name: str, pipeline: Any) -> nn.Module:
    """Loads a model that is on the meta device, into CPU memory.

    Args:
        model: the model on the meta device; its dtype is that of most of its weights.
        name: name of the pipeline's component.
        pipeline: the pipeline, or the model itself.

    Raises:
        AttentionProviderError: its configuration and the pipeline's name no folder or repository with its weights, or
            one where they are pickled.
    """
    cls: Any = type(model)
    tried: list[str] = []
    dtype = dtype_of(model)
    for path, folder in _sources(model, name, pipeline):
        tried.append(str(Path(path) / folder) if folder else path)
        try:
            loaded: nn.Module = from_safetensors(cls, path, **({"subfolder": folder} if folder else {}), dtype=dtype)
            return loaded
        except OSError:  # no such files there
            continue
    raise AttentionProviderError(
        f"{name} ({cls.__name__}) is on the meta device, and its weights were not found"
        f"{' in ' + ', '.join(tried) if tried else ': neither its configuration nor the pipeline names a path'}. Load "
        f"the pipeline around it with from_pretrained(path, {name}=...), so that the pipeline has the path; or load it "
        "into CPU memory."
    )


def _sources(model: Any, name: str, pipeline: Any) -> Iterator[tuple[str, str]]:
    """Folders or repositories that may have the weights, and their subfolders."""
    for owner in (pipeline, model):
        config: Any = getattr(owner, "config", None)
        path = getattr(config, "_name_or_path", None) or (config or {}).get("_name_or_path")
        if path and owner is not model:
            yield str(path), name
        elif path:
            yield str(path), ""
            yield str(path), name
