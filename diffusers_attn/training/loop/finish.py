"""The end of a run: the adapter's files, its model card, and the upload of both."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoints.state import Training
from ..data.ranks import in_step
from ..families import Family
from ..model.experts import adapter_folder, weights_of
from ..model.lora import adapter_weights, save_adapter
from ..model.whole import save_whole
from ..parallel import TrainingParallel
from ..settings.choices import WHOLE
from ..settings.config import TrainConfig
from .card import upload, write_card
from .loss_plot import draw_losses
from .validation import Sample


def finish(
    config: TrainConfig, family: Family, parallel: TrainingParallel, training: Training, samples: list[Sample]
) -> Path:
    """Writes the adapter and the model card, and uploads them with `push_to_hub`. All processes must call this.

    Returns:
        The adapter's file, as `Trainer.run` does.
    """
    average = training.average
    own = adapter_weights(training.transformer)
    averaged = own if average is None else average.weights()
    found: list[Path] = []

    def save(_: None) -> None:
        found.extend(save_adapters(config, family, training, averaged, config.output))
        if average is not None:
            save_adapters(config, family, training, own, config.output / "not_averaged")
        metrics = config.output / "metrics.jsonl"
        if config.metrics and importlib.util.find_spec("matplotlib") is not None:
            draw_losses(metrics, config.output / "loss.png")
        facts = {"processes": f"{parallel.dp_degree} x {parallel.cp_degree} (data x context parallel)"}
        write_card(config, family, samples, facts)
        if config.push_to_hub:
            upload(config)

    in_step(parallel.ranks, [None] if parallel.ranks.rank == 0 else [], save, "saving the adapter")
    return found[0] if found else config.output


def save_adapters(
    config: TrainConfig, family: Family, training: Training, weights: Mapping[str, Tensor], folder: Path
) -> list[Path]:
    """Saves the adapter of each trained transformer; with `adapter="none"` the transformers.

    Args:
        config: the settings.
        family: the family with its pipeline.
        training: the adapters, with their initial weights if these matter.
        weights: `adapter_weights` of all trained transformers, or their average.
        folder: folder for the files, with one for each of several adapters in it.

    Returns:
        The files, or the transformers' folders.
    """
    trained, initial, files = family.trained, training.initial, []
    several = len(trained) > 1
    for name, transformer in trained.items():
        own = weights_of(name, weights, several)
        if config.adapter == WHOLE:
            files.append(save_whole(transformer, own, folder / name))
            continue
        own_initial = None if initial is None else weights_of(name, initial, several)
        where = folder / adapter_folder(name, several)
        comfyui = "comfyui" in config.format
        files.append(save_adapter(family.pipeline, own, where, config.adapter, transformer, own_initial, comfyui))
    return files
