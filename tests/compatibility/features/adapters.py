"""Adapters: LoRAs by the methods of diffusers' pipelines, and other kinds in PEFT's format."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from diffusers_attn.training.model.lora import (
    adapter_config,
    adapter_weights,
    add_adapter,
    load_adapter,
    save_adapter,
)

from ...guidance import families
from ..feature import Feature, lossy, wan


def _weights(seed: int, rank: int = 2, **options: Any) -> dict[str, Tensor]:
    """A state dict, as in a file of an adapter."""
    donor = wan().transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        donor.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_v"], init_lora_weights=False, **options))
    return {f"transformer.{name}": value.clone() for name, value in get_peft_model_state_dict(donor).items()}


def _load(pipe: Any, seed: int = 1, name: str = "one", **options: Any) -> None:
    pipe.load_lora_weights(_weights(seed), adapter_name=name, **options)


def _two(pipe: Any) -> None:
    _load(pipe, 1, "one")
    _load(pipe, 2, "two")
    pipe.set_adapters(["one", "two"], [0.7, -0.4])


def _dora(pipe: Any) -> None:
    pipe.load_lora_weights(_weights(1, use_dora=True), adapter_name="one")


def _other_kind(kind: str) -> Callable[[Any], None]:
    """Loads an adapter that is no LoRA from a folder, as the trainer has written it."""

    def put(pipe: Any) -> None:
        donor = wan()
        add_adapter(donor.transformer, adapter_config(kind, 4, None, ["to_q", "to_v"]), seed=1)
        generator = torch.Generator().manual_seed(1)
        weights = {
            name: each + 0.3 * torch.randn(each.shape, generator=generator)
            for name, each in adapter_weights(donor.transformer).items()
        }
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(donor, weights, Path(folder), kind, donor.transformer)
            load_adapter(pipe.transformer, folder)

    return put


def _fused(pipe: Any) -> None:
    _load(pipe)
    pipe.fuse_lora()


def _between(*changes: Callable[[Any], None], distinct: bool = True) -> Callable[[Any], list[Tensor]]:
    """Calls the pipeline, and again after each change, which must change the result if `distinct`."""

    def draw(pipe: Any) -> list[Tensor]:
        results = [families.draw(pipe, "wan")]
        for change in changes:
            change(pipe)
            results.append(families.draw(pipe, "wan"))
        changed = [bool((one - other).abs().max() > 1e-6) for one, other in itertools.pairwise(results)]
        assert all(changed) or not distinct, changed
        return results

    return draw


FEATURES = {
    "one, loaded from a file": lossy(_load),
    "two, with weights": lossy(_two),
    "DoRA": lossy(_dora),
    "LoHa": lossy(_other_kind("loha")),
    "LoKr": lossy(_other_kind("lokr")),
    "OFT": lossy(_other_kind("oft")),
    "IA³": lossy(_other_kind("ia3")),
    "fused": lossy(_fused),
    "another scale between calls": Feature(
        _load, draw=_between(lambda pipe: pipe.set_adapters("one", 0.3), lambda pipe: pipe.set_adapters("one", -1.0))
    ),
    "hot-swapped between calls": Feature(_load, draw=_between(lambda pipe: _load(pipe, 3, hotswap=True))),
    "disabled, enabled, deleted": Feature(
        _load,
        draw=_between(
            lambda pipe: pipe.disable_lora(),
            lambda pipe: pipe.enable_lora(),
            lambda pipe: pipe.delete_adapters("one"),
        ),
    ),
    "loaded and unloaded between calls": Feature(draw=_between(_load, lambda pipe: pipe.unload_lora_weights())),
    "fused and unfused between calls": Feature(
        _load, draw=_between(lambda pipe: pipe.fuse_lora(), lambda pipe: pipe.unfuse_lora(), distinct=False)
    ),
}
