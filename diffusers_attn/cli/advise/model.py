"""The model to predict: its modules without weights, and the rows that each of its matrix products has."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ...cp_plans.registry import get_cp_plan, list_cp_plans, uncovered
from ...cp_plans.uncovered import UNCOVERED
from ...errors import AttentionProviderError
from ...parallelize.targets import Target, split_attention
from ...tiny_models import BATCH, CASES
from ...tiny_models.case import TEXT
from ..names import one_class
from .grids import Size

NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": ("WanTransformer3DModel", {}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuan-video15": ("HunyuanVideo15Transformer3DModel", {}),
    "cogvideox-5b": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
}
"""Class, and the part of the configuration that differs from the default of the class, by name on the command line."""


_TEXT = 512
"""Tokens of a text that attention does not join, as in Wan."""


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """A model without weights."""

    target: Target
    other_bytes: int | None
    """Bytes of the weights of the pipeline's other models; None if they are not known."""

    @property
    def model(self) -> nn.Module:
        return self.target.model

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(each.numel() for each in self.model.parameters())


def described(name: str) -> ModelDescription:
    """The model of a name: one of `NAMED`, a model class with its default configuration, a folder with a pipeline or a
    model, or a repository on the Hugging Face Hub, of which only configurations are read.

    Raises:
        AttentionProviderError: there is no such model, it has no plan, or the class has no complete default.
    """
    if name in NAMED:
        cls_name, config = NAMED[name]
        return ModelDescription(_target(cls_name, config), None)
    if Path(name).is_dir() or "/" in name:
        return _of_folder(name)
    cls_name = one_class(name, [*list_cp_plans(), *UNCOVERED])
    return ModelDescription(_target(cls_name, {}), None)


def _of_folder(name: str) -> ModelDescription:
    """The first transformer of a pipeline, or a single model."""
    try:
        if Path(name, "config.json").is_file():
            config = dict(json.loads(Path(name, "config.json").read_text()))
            other: int | None = 0
        else:
            index: Any = diffusers.DiffusionPipeline.load_config(name)
            parts = {key: value[1] for key, value in index.items() if isinstance(value, (list, tuple))}
            known = [key for key, cls in parts.items() if cls in list_cp_plans()]
            if not known:
                listed = ", ".join(f"{key} ({cls})" for key, cls in parts.items())
                raise AttentionProviderError(f"no model of {name} has a plan. It has: {listed}.")
            cls = getattr(diffusers, parts[known[0]])
            config = {**cls.load_config(name, subfolder=known[0]), "_class_name": parts[known[0]]}
            other = _bytes_of_other_models(Path(name), known[0])
    except OSError as error:
        raise AttentionProviderError(
            f"{name} has no configuration that can be read: {' '.join(str(error).split())[:300]}. Accepted are "
            f"{', '.join(NAMED)}; a model class; a folder; or a repository on the Hugging Face Hub."
        ) from error
    cls_name = config.pop("_class_name", "")
    return ModelDescription(_target(cls_name, {k: v for k, v in config.items() if not k.startswith("_")}), other)


def _bytes_of_other_models(folder: Path, transformer: str) -> int | None:
    """Bytes of the weights of a pipeline's other models; None if the folder has none, as on the Hub."""
    files = [each for each in folder.glob("*/*") if each.suffix in (".safetensors", ".bin")]
    sizes = [each.stat().st_size for each in files if each.parent.name != transformer]
    return sum(sizes) if folder.is_dir() else None


def _target(cls_name: str, config: Mapping[str, Any]) -> Target:
    cls = getattr(diffusers, cls_name, None)
    if cls is None:
        raise AttentionProviderError(f"diffusers {diffusers.__version__} has no class {cls_name!r}.")
    if cls_name in UNCOVERED:
        raise AttentionProviderError(str(uncovered(type(cls_name, (), {})())))
    try:
        with torch.device("meta"):
            model = cls.from_config(dict(config)) if config else cls()
    except AttentionProviderError:
        raise
    except Exception as error:
        raise AttentionProviderError(
            f"{cls_name} cannot be made from this configuration ({type(error).__name__}: {error}). Give the folder of "
            "a pipeline that has it."
        ) from error
    return Target(cls_name, model, get_cp_plan(model))


def products(described: ModelDescription, size: Size) -> Iterator[tuple[int, float, bool]]:
    """The matrix products of a forward: number of weights, number of rows, and whether the rows are split between
    ranks. A tiny model of the class shows which layers compute with all tokens, with the text, or with one vector."""
    rows = rows_of_tiny(type(described.model).__name__)
    text = size.text or _TEXT
    for name, module in described.model.named_modules():
        seen = rows.seen.get(pattern(name))
        if not isinstance(module, nn.Linear) or seen is None:  # the tiny model has no such layer, or does not call it
            continue
        weights = module.in_features * module.out_features
        share = seen / rows.attention
        if seen <= 1:
            yield weights, 1.0, False
        elif size.text and math.isclose(share, 1 - TEXT / rows.attention, rel_tol=0.02):
            yield weights, size.tokens - size.text, True
        elif seen % TEXT == 0 and (share > 1 or share < 0.5):
            # A text that attention does not join is complete on every rank.
            yield weights, text * seen / TEXT, size.text > 0
        else:
            yield weights, size.tokens * share, True


def local_attention_flops(described: ModelDescription, size: Size) -> float:
    """Floating-point operations of the attention of split queries to keys that every rank has, such as a text."""
    rows = rows_of_tiny(type(described.model).__name__)
    split = {name for name, *_ in split_attention(described.target)}
    found = 0.0
    for name, module in described.model.named_modules():
        attention, _, own = name.rpartition(".")
        if own == "to_q" and isinstance(module, nn.Linear) and attention not in split and pattern(name) in rows.seen:
            queries, keys = rows.of_queries(attention) / rows.attention, rows.of_keys(attention)
            if queries >= 0.5 and keys < rows.attention:
                found += 4 * size.tokens * queries * (size.text or _TEXT) * module.out_features
    return found


def attention_tokens(rows: LayerRows, name: str, size: Size) -> int:
    """The tokens of an attention module: all, or fewer where it attends to another sequence, such as audio. Queries and
    keys of different lengths count as their geometric mean."""
    shares = (min(1.0, each / rows.attention) for each in (rows.of_queries(name), rows.of_keys(name)))
    return max(1, round(size.tokens * math.sqrt(math.prod(1 if share >= 0.5 else share for share in shares))))


def pattern(name: str) -> str:
    """The name of a module with `*` for the numbers of blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@dataclasses.dataclass(frozen=True)
class LayerRows:
    """The linear layers of a tiny model."""

    seen: dict[str, float]
    """Rows of a sample in each layer, by the layer's name with `*` for numbers; the most of all such layers."""
    attention: float
    """Number of tokens that most of its split attention joins."""

    def of_queries(self, name: str) -> float:
        """Number of queries of an attention module, given its name."""
        return self._of(name, "to_q", "add_q_proj")

    def of_keys(self, name: str) -> float:
        """Number of keys of an attention module, given its name."""
        return self._of(name, "to_k", "add_k_proj")

    def _of(self, name: str, own: str, joined: str) -> float:
        layers = {each.rpartition(".")[2]: rows for each, rows in self.seen.items() if _parent(each) == pattern(name)}
        if own in layers:
            return layers[own] + layers.get(joined, 0.0)
        return max(layers.values(), default=self.attention)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@functools.cache
def rows_of_tiny(cls_name: str) -> LayerRows:
    """The rows in each linear layer of a tiny model of a class."""
    case = next(case for case in CASES.values() if case.model_class == cls_name)
    model = case.build()
    found: dict[str, float] = {}

    def hook(name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            found[name] = max(found.get(name, 0.0), output.numel() / output.shape[-1] / BATCH)

        return count

    handles = [
        module.register_forward_hook(hook(pattern(name)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**case.inputs())
    for handle in handles:
        handle.remove()
    rows = LayerRows(found, max(found.values(), default=1.0))
    names = [pattern(name) for name, *_ in split_attention(Target(cls_name, model, get_cp_plan(model)))]
    counts = collections.Counter(names)
    usual = [rows.of_queries(name) for name, count in counts.items() if count == max(counts.values())]
    return LayerRows(found, max(usual, default=rows.attention))
