"""Divides a model into units: FSDP2 gathers the weights of a unit before its forward, and frees them after it.

A unit is a repeated block, or, outside of blocks, a layer. Layers are the smallest units outside of blocks because some
pipelines and models call a layer without its parents: `text_encoder.get_input_embeddings()(ids)`.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST = 1e-3
"""Layers outside of blocks with a smaller share of the model's weights are not sharded: their gather would take longer
than it is worth."""


class Unit(NamedTuple):
    """Modules whose weights are gathered together."""

    path: str
    """Path of the first module, with which the unit is named."""
    modules: tuple[nn.Module, ...]
    """One block; or one layer, or several layers that share a weight, such as an embedding and an output layer."""
    next: str | None = None
    """Path of the block that runs after this one; None for the last block of a list, and for layers."""

    def weights(self) -> list[nn.Parameter]:
        """The weights of these modules, each once."""
        found = {id(weight): weight for module in self.modules for weight in module.parameters()}
        return list(found.values())


def units(model: nn.Module) -> list[Unit]:
    """The units of `model`, in the order of its modules. No unit is part of another, and none shares a weight with a
    module outside of it."""
    total = sum(weight.numel() for weight in model.parameters())
    adapters = adapter_weights(model)
    rules = _Rules(frozenset(_block_classes(model)), _input_embeddings(model))
    found: list[Unit] = []
    for unit, is_block in _without_shared_weights(model, list(_candidates(model, "", rules))):
        numel = sum(weight.numel() for weight in sharded_weights(unit, adapters))
        if numel and (is_block or numel >= SMALLEST * total):
            found.append(unit)
    paths = {each.path for each in found}
    return [each._replace(next=each.next if each.next in paths else None) for each in found]


def sharded_weights(unit: Unit, adapters: Mapping[int, Tensor]) -> list[nn.Parameter]:
    """The weights of a unit that FSDP2 shards. Every rank keeps the others."""
    return [each for each in unit.weights() if can_be_sharded(each) and id(each) not in adapters]


class _UnitCandidate(NamedTuple):
    path: str
    module: nn.Module
    is_block: bool
    next: str | None = None


class _Rules(NamedTuple):
    blocks: frozenset[str]
    """Names of classes of blocks."""
    embeddings: list[nn.Module]
    """Embeddings of tokens, which pipelines call by themselves."""

    def is_block(self, module: nn.Module, is_listed: bool) -> bool:
        """Whether a module is a block: of a class of blocks, or in a list and small enough."""
        if isinstance(module, _CONTAINERS) or not any(True for _ in module.children()):
            return False
        if is_listed:
            return type(module).__name__ in self.blocks or not _has_blocks(module, self.blocks)
        return type(module).__name__ in self.blocks and not any(
            each is embedding for each in module.modules() for embedding in self.embeddings
        )


_LEAF_CLASSES = ("HunyuanDiTAttentionPool", "MultiheadAttention", "TransformerEncoderLayer")
"""Names of classes that use the weights of layers within them without calling these. They count as layers."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Models call the modules in these, often without calling the container."""


def _candidates(module: nn.Module, path: str, rules: _Rules) -> Iterator[_UnitCandidate]:
    """Blocks, and layers outside of blocks."""
    children = list(module.named_children())
    if path and (not children or type(module).__name__ in _LEAF_CLASSES):
        yield _UnitCandidate(path, module, False)
        return
    listed = isinstance(module, nn.ModuleList)
    for place, (name, child) in enumerate(children):
        inner = f"{path}.{name}" if path else name
        if rules.is_block(child, listed):
            following = children[place + 1][0] if listed and place + 1 < len(children) else None
            yield _UnitCandidate(inner, child, True, f"{path}.{following}" if following is not None else None)
        else:
            yield from _candidates(child, inner, rules)


def _without_shared_weights(model: nn.Module, candidates: list[_UnitCandidate]) -> Iterator[tuple[Unit, bool]]:
    """Units of these candidates, and whether each is a block. Layers that share a weight become one unit. A candidate
    that shares a weight with any other module is left out."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners.setdefault(id(weight), []).append(id(module))
    layers = {id(each.module): each for each in candidates if not each.is_block}
    done: set[int] = set()
    for path, module, is_block, following in candidates:
        own = {id(each) for each in module.modules()}
        sharing = {owner for weight in module.parameters() for owner in owners[id(weight)]} - own
        if id(module) in done:
            continue
        if not sharing:
            yield Unit(path, (module,), following), is_block
        elif not is_block and all(owner in layers for owner in sharing):
            done |= sharing
            others = (each.module for key, each in layers.items() if key in sharing)  # in the same order on all ranks
            yield Unit(path, (module, *others)), False


def _block_classes(model: nn.Module) -> set[str]:
    """Names of the classes that diffusers and transformers list as blocks of this model and of models within it."""
    found: set[str] = set()
    for module in model.modules():
        for name in ("_no_split_modules", "_repeated_blocks"):
            found.update(getattr(type(module), name, None) or ())
    return found


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for module in model.modules():
        with contextlib.suppress(AttributeError, NotImplementedError):  # transformers: a model without one
            found.append(module.get_input_embeddings())  # type: ignore[operator]
    return [each for each in found if isinstance(each, nn.Embedding)]


def _has_blocks(module: nn.Module, blocks: frozenset[str]) -> bool:
    """Whether there are blocks within `module`, so that it is larger than a block."""
    inner = [each for each in module.modules() if each is not module]
    return any(type(each).__name__ in blocks for each in inner) or any(
        isinstance(each, nn.ModuleList) and len(each) > 1 and all(any(True for _ in one.children()) for one in each)
        for each in inner
    )


def can_be_sharded(weight: Tensor) -> bool:
    """Whether FSDP2 shards tensors of this layout: contiguous, with at least one dimension and one element."""
    return weight.ndim > 0 and weight.numel() > 0 and weight.is_contiguous()


def adapter_weights(model: nn.Module) -> dict[int, Tensor]:
    """The weights of PEFT's adapters within `model`, by id. They are small, and every rank keeps them."""
    found: dict[int, Tensor] = {}
    for layer in model.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            for part in dict(getattr(layer, name, None) or {}).values():
                found |= {id(each): each for each in ([part] if isinstance(part, Tensor) else part.parameters())}
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most weights of `model`."""
    sizes: collections.Counter[torch.dtype] = collections.Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
