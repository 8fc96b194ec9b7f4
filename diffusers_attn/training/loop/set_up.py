"""Set-up of a run: the pipeline is loaded, its transformers get adapters, and these an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..checkpoints.resuming import Facts, settings_of
from ..checkpoints.state import Training, read_initial
from ..data.loader import LatentLoader
from ..errors import TrainingError
from ..families import Family, family_of
from ..model.base_precision import base_dtype
from ..model.ema import AdapterAverage
from ..model.experts import Experts, as_one_module, shard_each
from ..model.init_adapter import read_adapter, start_from
from ..model.lora import MOVES_BASE, adapter_config, adapter_weights, add_adapter, move_base
from ..model.offload import offload_blocks
from ..model.optim import make_optimizer, make_schedule
from ..model.pipeline import load_pipeline
from ..model.whole import train_whole
from ..parallel import TrainingParallel
from ..settings.choices import WHOLE
from ..settings.config import TrainConfig
from ..settings.flag_names import option


def load_family(config: TrainConfig, accelerator: Any, parallel: TrainingParallel) -> Family:
    """Loads the pipeline in its precision, and finds its family."""
    pipeline = load_pipeline(
        config.model,
        revision=config.revision,
        dtype=base_dtype(config, accelerator.mixed_precision),
        transformer=config.transformer,
        base_precision=config.base_precision,
        ranks=parallel.ranks,
        local_main=accelerator.is_local_main_process,
        expert=config.expert,
        whole=config.adapter == WHOLE,
    )
    return family_of(
        pipeline,
        shift=config.shift,
        guidance=config.guidance,
        max_sequence_length=config.max_sequence_length,
        min_snr_gamma=config.min_snr_gamma,
        expert=config.expert,
        audio_weight=config.audio_weight,
        fps=config.fps,
    )


def check_equal_bases(config: TrainConfig, parallel: TrainingParallel, base: str) -> None:
    """Raises TrainingError if processes loaded other weights. (DDP does not compare frozen weights.)

    Args:
        config: the settings.
        parallel: the processes.
        base: fingerprint of the weights on this process.
    """
    bases = parallel.ranks.everyone(base)
    if len(set(bases)) > 1:
        other = next(rank for rank, each in enumerate(bases) if each != bases[0])
        raise TrainingError(
            f"{option('model', config.model)}: ranks 0 and {other} loaded other weights. Give all machines "
            "the same files."
        )


def adapter_of(config: TrainConfig, family: Family) -> Any:
    """PEFT's configuration of the adapter that the settings describe; None if the transformer's weights are trained."""
    if config.adapter == WHOLE:
        return None
    targets = config.targets or family.lora_targets
    return adapter_config(
        config.adapter, config.rank, config.alpha, targets, config.adapter_init, config.adapter_dropout
    )


class Adapted(NamedTuple):
    """The transformers with their adapters, ready to be prepared by Accelerate."""

    module: nn.Module
    """The only transformer, or `Experts` of several."""
    parameters: list[nn.Parameter]
    """The trained ones."""
    initial: dict[str, Tensor] | None
    """Initial weights of the adapter if they changed the base model; see `lora.MOVES_BASE`."""
    report: Any
    """Of `TrainingParallel.enable`."""


def add_adapters(
    config: TrainConfig,
    family: Family,
    parallel: TrainingParallel,
    device: Any,
    checkpoint: Path | None,
    offload_folder: Callable[[str], Path | None],
    compiled: bool,
) -> Adapted:
    """Adds adapters, and prepares each transformer for training: offloaded, split over ranks, compiled, as set.

    Args:
        config: the settings.
        family: the family with its pipeline.
        parallel: the processes.
        device: this process's device.
        checkpoint: checkpoint to resume from; None for a new run.
        offload_folder: for a component's name, the folder of the files of its blocks; None if there are none.
        compiled: whether to compile blocks.
    """
    trained = family.trained
    module = as_one_module(trained)
    if config.offload == "none":
        module.to(device)
    # The adapter is added first: PEFT replaces modules, and the plan's hooks belong on the new ones.
    initial = read_initial(checkpoint) if checkpoint is not None else None
    parameters = []
    for transformer in trained.values():
        adapter = adapter_of(config, family)
        if adapter is None:
            parameters += train_whole(transformer)
            continue
        if initial is not None:
            adapter.init_lora_weights = True
        parameters += add_adapter(transformer, adapter, config.seed)
    if config.init_adapter is not None and checkpoint is None:
        for name, transformer in trained.items():
            saved = read_adapter(family.pipeline, Path(config.init_adapter), name, len(trained) > 1)
            start_from(saved, transformer)
    if initial is not None:
        move_base(module, initial)
    elif config.adapter_init in MOVES_BASE:
        initial = adapter_weights(module)
    report = None
    for name, transformer in trained.items():
        if config.offload != "none":
            offload_blocks(transformer, device, offload_folder(name))
        report = parallel.enable(transformer, provider=config.attn_provider, inputs="trust")
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if compiled:
            from ...runtime.compile import apply_compile

            apply_compile(transformer)
    module.train()
    return Adapted(module, parameters, initial, report)


def make_training(
    config: TrainConfig,
    accelerator: Any,
    parallel: TrainingParallel,
    adapted: Adapted,
    loader: LatentLoader,
    facts: Facts,
) -> tuple[Training, Any]:
    """Makes the optimizer and its schedule, and lets Accelerate wrap the model.

    Returns:
        All of a run that a checkpoint stores, and Accelerate's wrapper of the optimizer.
    """
    module = adapted.module
    # DDP would send all weights from rank 0 to the others, which fails for quantised ones. The adapter has the same
    # seed everywhere, and the base models were compared.
    module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        *(name for name, each in module.named_parameters() if not each.requires_grad),
        *(name for name, _ in module.named_buffers()),
    ]
    sharded = accelerator.distributed_type == "FSDP"
    if sharded and isinstance(module, Experts):
        shard_each(module, accelerator)
    optimizer: Any = make_optimizer(
        config.optimizer,
        adapted.parameters,
        learning_rate=config.learning_rate,
        betas=(config.adam_betas[0], config.adam_betas[1]),
        weight_decay=config.weight_decay,
        eps=config.adam_eps,
        fused=accelerator.device.type == "cuda" and not sharded,
    )
    placement = [config.offload == "none", True]
    model, wrapped = accelerator.prepare(module, optimizer, device_placement=placement)
    if sharded and isinstance(module, Experts):
        model(None)  # FSDP2 needs a forward of the whole before one of a part, which samples before the first step run
    inner = wrapped.optimizer
    schedule = make_schedule(config.lr_schedule, inner, warmup_steps=config.warmup_steps, steps=config.steps)
    average = None if config.ema_decay is None else AdapterAverage(model, config.ema_decay)
    settings = settings_of(config, parallel.dp_degree)
    return Training(model, inner, schedule, average, loader, settings, facts, adapted.initial), wrapped
