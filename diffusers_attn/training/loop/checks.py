"""Checks that take seconds, made before hours of encoding and training: of the settings, and with the loaded model."""

from __future__ import annotations

import copy
import difflib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...parallelize.targets import find_targets
from ..batches.buckets import buckets_of, rate_of
from ..data.conditions import CONDITIONS
from ..errors import TrainingError
from ..families import Family
from ..model.base_precision import check_adapter_kind, is_quantised
from ..model.comfyui import check_comfyui
from ..model.init_adapter import check_adapter, read_adapter
from ..model.lora import OF_MATRICES, add_adapter, is_expression, linear_layers, trained_parameters
from ..model.optim import check_optimizer, make_optimizer, make_schedule
from ..settings.choices import OPTIMIZERS
from ..settings.config import TrainConfig
from ..settings.contradictions import check_effect
from ..settings.flag_names import option
from .card import check_push
from .preview_checks import check_number_of_frames, check_previews

# ---- Without the model


def check_trackers(names: Sequence[str] | None) -> None:
    """Raises TrainingError for an unknown tracker, or one whose package is not installed (which Accelerate ignores)."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(getattr(each, "value", each)) for each in get_available_trackers()}
    for name in names:
        if name != "all" and name not in LOGGER_TYPE_TO_CLASS:
            raise TrainingError(f"{option('trackers', name)}: accepted are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
        if name in LOGGER_TYPE_TO_CLASS and name not in installed and not _is_registered(LOGGER_TYPE_TO_CLASS[name]):
            raise TrainingError(f"{option('trackers', name)}: its package is not installed: `pip install {name}`.")


def _is_registered(tracker: type) -> bool:
    """Whether a tracker class was registered by a user, rather than being one of Accelerate's."""
    return not tracker.__module__.startswith("accelerate.")


def check_optimizing(config: TrainConfig, device: torch.device, sharded: bool) -> None:
    """Tries one optimizer step on a small parameter, and evaluates the learning-rate schedule at a few steps.

    Args:
        config: the settings.
        device: this process's device.
        sharded: whether FSDP2 shards parameters.

    Raises:
        TrainingError: the optimizer or the schedule does not accept the settings, or does not work on this device or
            with shards.
    """
    check_optimizer(config.optimizer)
    if sharded and not OPTIMIZERS[config.optimizer].of_shards:
        others = " or ".join(f"--optimizer {name}" for name, each in OPTIMIZERS.items() if each.of_shards)
        raise TrainingError(
            f"{option('optimizer', config.optimizer)} with FSDP2: {OPTIMIZERS[config.optimizer].package} updates whole "
            f"tensors, and FSDP2 gives each rank a shard of them. Give {others}, whose state is sharded; or start with "
            "DDP, for example from examples/accelerate_configs."
        )
    parameter = nn.Parameter(torch.zeros(64, 64, device=device))
    try:
        optimizer = make_optimizer(
            config.optimizer,
            [parameter],
            learning_rate=config.learning_rate,
            betas=(config.adam_betas[0], config.adam_betas[1]),
            weight_decay=config.weight_decay,
            eps=config.adam_eps,
        )
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(f"{option('optimizer', config.optimizer)} does not work on {device}: {error}") from error
    try:
        schedule = make_schedule(config.lr_schedule, optimizer, warmup_steps=config.warmup_steps, steps=config.steps)
        for rate in schedule.lr_lambdas:
            for step in (0, config.warmup_steps, config.steps - 1, config.steps):
                rate(step)
    except (ValueError, ArithmeticError) as error:
        raise TrainingError(
            f"{option('lr_schedule', config.lr_schedule)} does not work with a learning rate of {config.rate:g}, "
            f"{option('lr_warmup_steps', config.warmup_steps)} and {option('steps', config.steps)}: {error}"
        ) from error


def check_folders(config: TrainConfig) -> None:
    """Raises TrainingError if the output folder or the cache folder cannot be written. Call it on one process.

    A dry run makes no folders, and tries those that exist above them.
    """
    for name, folder in (("output_dir", config.output), ("cache_dir", config.cache)):
        if name == "output_dir" or config.cache_dir:
            there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
            _check_writable(name, there if config.dry_run else folder)


def _check_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise TrainingError(
            f"{option(name, str(folder))} cannot be written: {error.strerror or error}. Give another folder, or check "
            "this one's permissions and free space."
        ) from error


def check_settings(config: TrainConfig) -> None:
    """Checks on one process that files can be written and uploaded. Raises TrainingError."""
    if config.push_to_hub:
        check_push(config)
    check_folders(config)


# ---- With the model


def check_with_model(config: TrainConfig, family: Family, adapter: Any) -> None:
    """Checks settings against the loaded model.

    Args:
        config: the settings.
        family: the family with its pipeline.
        adapter: from `adapter_config`; None without an adapter.

    Raises:
        TrainingError: no layer matches the targets; the layers do not support the adapter; or the model or its
            pipeline does not accept a size or length.
    """
    check_effect(config, timestep_sampling=config.timestep_sampling or family.objective.sampling)
    for component, transformer in family.trained.items():
        if config.targets:
            check_targets(transformer, config.targets)
        check_adapter_kind(config, transformer)
        if "comfyui" in config.format:
            check_comfyui(type(transformer).__name__, config.adapter)
        if adapter is None:
            continue
        bare = _check_adapter(config, transformer, adapter)
        _check_gradients(config, family, bare)
        if config.init_adapter is not None and config.resume is None:
            path = Path(config.init_adapter)
            check_adapter(read_adapter(family.pipeline, path, component, len(family.trained) > 1), bare)
    _check_conditions(config, family)
    _check_buckets(config, family)
    _check_sound(config, family)
    check_previews(config, family)


def _check_gradients(config: TrainConfig, family: Family, bare: nn.Module) -> None:
    """Raises TrainingError if layers have adapters although nothing that is trained depends on them."""
    if family.without_gradient is None:
        return
    unused = [name for name in trained_parameters(bare) if re.search(family.without_gradient, name)]
    if unused:
        layer = re.split(r"\.(?:lora|hada|lokr|oft|ia3)_", unused[0])[0]
        raise TrainingError(
            f"{option('targets', config.targets)}: the video does not depend on {layer}, which would not be trained "
            f"with {option('audio_weight', config.audio_weight)}. Give names of the video's layers, such as "
            f"{family.lora_targets[0]}."
        )


def check_split(family: Family, cp_degree: int) -> None:
    """Raises AttentionProviderError if processes would share sequences of a model that cannot be split, as a UNet."""
    if cp_degree > 1:
        for model in family.trained.values():
            find_targets(model, None)


def _check_conditions(config: TrainConfig, family: Family) -> None:
    """Raises TrainingError for a folder of conditions that the model does not use."""
    name = type(family.pipeline).__name__
    used = ", ".join(f"--{each}" for each in family.example_conditions)
    for kind, each in CONDITIONS.items():
        if getattr(config, kind) is not None and kind not in family.example_conditions:
            instead = f"Give {used} in its place" if used else "Leave it out"
            raise TrainingError(f"{option(kind, getattr(config, kind))}: {name} takes no {each.what}. {instead}.")


def _check_sound(config: TrainConfig, family: Family) -> None:
    """Raises TrainingError if sound is trained, but frames have no fixed rate, and so no length in seconds."""
    if family.sound_rate is None or rate_of(config, family) is not None:
        return
    given = option("fps", config.fps) if config.fps == 0 else option("frame_pick", config.frame_pick)
    raise TrainingError(
        f"{given}: {type(family.pipeline).__name__} learns sound, which belongs to frames at a fixed rate. Leave it "
        "out, or train videos alone with --audio_weight 0."
    )


def check_targets(transformer: nn.Module, targets: Sequence[str]) -> None:
    """Raises TrainingError if one of `targets` matches no layer. (PEFT only raises if none of them does.)"""
    if is_expression(targets):
        try:
            re.compile(targets[0])
        except re.error as error:
            raise TrainingError(f"{option('targets', targets)} is not a regular expression: {error}.") from error
        return  # PEFT raises if it matches nothing
    names = [name for name, _ in transformer.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = linear_layers(transformer)
            near = difflib.get_close_matches(target, ends, 1)
            raise TrainingError(
                f"{option('targets', targets)}: no layer has the name {target!r} or a name that ends in it. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + f"Its linear layers end in {', '.join(ends)}. (A regular expression must be the only value, and "
                "match entire names.)"
            )


def _check_adapter(config: TrainConfig, transformer: nn.Module, adapter: Any) -> nn.Module:
    """Adds the adapter to a copy of the model without weights, and returns the copy.

    Initialisations that need weights are not run; the shapes that they need are compared instead.
    """
    adapter = copy.deepcopy(adapter)
    if hasattr(adapter, "init_lora_weights"):
        adapter.init_lora_weights = True
    bare = without_weights(transformer)
    add_adapter(bare, adapter, config.seed)
    if config.adapter_init not in OF_MATRICES:
        return bare
    for name, layer in bare.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        shape = tuple(layer.get_base_layer().weight.shape)
        least = min(shape) if len(shape) == 2 else 0
        if (config.adapter_init == "olora" and config.rank > least) or not least:
            raise TrainingError(
                f"{option('adapter_init', config.adapter_init)} with {option('rank', config.rank)} needs matrices with "
                f"at least as many rows and columns as the rank, but {name} has weights of shape {list(shape)}. Give "
                "another --adapter_init, a smaller --rank or other --targets."
            )
    return bare


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module with tensors on the meta device, which takes no memory. Its weights are not quantised."""
    if is_quantised(module):
        config = {name: each for name, each in module.config.items() if name != "quantization_config"}  # type: ignore[union-attr, operator]
        with torch.device("meta"):
            return type(module).from_config(config)  # type: ignore[attr-defined]
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=each.requires_grad)
        for each in module.parameters()
    }
    memo |= {id(each): torch.empty_like(each, device="meta") for each in module.buffers()}
    return copy.deepcopy(module, memo)


def _check_buckets(config: TrainConfig, family: Family) -> None:
    least = family.size_multiple
    for side in [*config.resolution, *(side for source in config.sources for side in source.resolution or [])]:
        if side < least:
            raise TrainingError(f"{option('resolution', side)}: this model needs a side of at least {least} pixels.")
    for number in [
        *(config.num_frames or []),
        *(each for source in config.sources for each in source.num_frames or []),
    ]:
        check_number_of_frames("num_frames", number, family)
    buckets_of(config, family)
