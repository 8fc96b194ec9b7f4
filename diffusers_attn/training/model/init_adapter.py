"""An adapter that training goes on from: a file of weights, read by diffusers and put into the trained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import TrainingError
from ..settings.flag_names import option
from .experts import adapter_folder
from .lora import ADAPTER, LORA_FILE, writer_of


class SavedAdapter(NamedTuple):
    """The weights of an adapter in a file."""

    path: Path
    layers: dict[str, Tensor]
    """Weights by PEFT's names in the transformer, such as `NAME.lora_A.weight`."""
    scalings: dict[str, float]
    """Factor of the product of the weights, by `NAME`."""


def read_adapter(pipeline: Any, path: Path, component: str = "transformer", several: bool = False) -> SavedAdapter:
    """Reads an adapter in diffusers' format, or in another one that the pipeline's `load_lora_weights` reads.

    Args:
        pipeline: the pipeline of the adapter's model.
        path: a .safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        component: the pipeline's component with the adapter.
        several: whether `path` is a folder with a folder for each of several components.

    Raises:
        TrainingError: there is no such file, it cannot be read, or it has no weights of a transformer.
    """
    within = path / adapter_folder(component, several)
    file = within / LORA_FILE if within.is_dir() else within
    what = option("init_adapter", str(path))
    if not file.is_file():
        raise TrainingError(f"{what}: there is no file {file}.")
    try:
        # Without `return_alphas`, some pipelines drop the alphas of files that have them. The others ignore it.
        found, *alphas, metadata = writer_of(type(pipeline)).lora_state_dict(
            str(file), use_safetensors=True, return_lora_metadata=True, return_alphas=True
        )
    except Exception as error:  # diffusers' converters have many error types
        raise TrainingError(f"{what} cannot be read as a LoRA of {type(pipeline).__name__}: {error}") from error
    start = "unet." if component == "unet" else "transformer."  # also that of the second of two transformers
    layers = _beginning(found, start)
    if not layers or not all(".lora_" in name for name in layers):
        raise TrainingError(
            f"{what} has no LoRA of a transformer, but {len(found)} tensors such as {next(iter(found), 'none')}."
        )
    of_layers = _beginning(alphas[0] or {}, start) if alphas else {}
    settings = _beginning(metadata or {}, start)
    ranks = {name.removesuffix(".lora_A.weight"): each.shape[0] for name, each in layers.items() if ".lora_A." in name}
    scalings = {name: _scaling(rank, of_layers.get(f"{name}.alpha"), settings) for name, rank in ranks.items()}
    return SavedAdapter(file, layers, scalings)


def _beginning(values: Mapping[str, Any], start: str) -> dict[str, Any]:
    """The values whose names begin with `start`, by the rest of their names."""
    return {name.removeprefix(start): each for name, each in values.items() if name.startswith(start)}


def _scaling(rank: int, alpha: Any, settings: Mapping[str, Any]) -> float:
    """The scaling of a layer: by its own alpha, by the settings in the file's metadata, or 1."""
    if alpha is not None:
        return float(alpha) / rank
    if "lora_alpha" not in settings:
        return 1.0
    return float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)


def check_adapter(saved: SavedAdapter, transformer: nn.Module) -> None:
    """Raises TrainingError unless a saved adapter has the layers and ranks of the adapter in `transformer`."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    what = f"--init_adapter {saved.path}"
    odd = sorted(set(expected) ^ set(saved.layers))
    if odd:
        where = "the file" if odd[0] in saved.layers else "the run"
        raise TrainingError(
            f"{what} is an adapter of other layers: {len(odd)} tensors differ, for example {odd[0]}, which only "
            f"{where} has. Give --targets and --adapter as the adapter has them."
        )
    for name, each in expected.items():
        if tuple(each.shape) != tuple(saved.layers[name].shape):
            rank = min(saved.layers[name].shape)
            raise TrainingError(
                f"{what}: {name} has shape {list(saved.layers[name].shape)}, but {list(each.shape)} is trained. Give "
                f"the adapter's rank, such as {option('rank', rank)}."
            )


def start_from(saved: SavedAdapter, transformer: nn.Module) -> None:
    """Puts a saved adapter into that of `transformer`, which computes the same afterwards, also with another alpha.

    Raises:
        TrainingError: as `check_adapter` does.
    """
    from peft import set_peft_model_state_dict

    check_adapter(saved, transformer)
    scalings = {
        name: each.scaling[ADAPTER]
        for name, each in transformer.named_modules()
        if ADAPTER in getattr(each, "scaling", {})
    }
    weights = {}
    for name, each in saved.layers.items():
        layer, _, of_up = name.partition(".lora_B.")
        weights[name] = each.float() * (saved.scalings[layer] / scalings[layer]) if of_up else each.float()
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)
