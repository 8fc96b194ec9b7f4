"""What is accepted of Accelerate's configuration, and what is changed in it."""

from __future__ import annotations

from typing import Any

import torch

from ..context_parallel import job as jobs
from ..parallelize.targets import models_of
from .errors import TrainingError

SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
"""Accelerate's distributed types for which gradients are tested."""


def check_accelerator(accelerator: Any) -> None:
    """Raises TrainingError for configurations of Accelerate under which gradients would be wrong."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in SUPPORTED:
        raise TrainingError(
            f"Accelerate's distributed_type is {kind}; accepted are one process, DDP (MULTI_GPU, MULTI_CPU) and FSDP2. "
            "Choose one of these with `accelerate config`, or use a file from examples/accelerate_configs."
        )
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise TrainingError(
            f"fsdp_version={accelerator.state.fsdp_plugin.fsdp_version}: only FSDP2 is accepted. Set fsdp_version: 2 "
            "in Accelerate's fsdp_config, or pass --fsdp_version 2 to accelerate launch."
        )
    config = accelerator.parallelism_config
    for axis in ("tp", "sp"):
        size = getattr(config, f"{axis}_size", 1) or 1
        if size > 1:
            raise TrainingError(
                f"parallelism_config_{axis}_size={size}: only data and context parallelism are accepted. Set it to 1."
            )


def autocast_instead(accelerator: Any, pipeline_or_model: Any) -> None:
    """Replaces FSDP2's mixed-precision policy by autocast, as Accelerate uses it without FSDP2.

    A policy that the user set stays. Accelerate's own policy casts every input of the blocks, such as timesteps and
    rotary frequencies, weights that diffusers keeps in float32, and gradients before they are reduced; losses are off
    by percents. With autocast, FSDP2 only shards.
    """
    from accelerate.utils import convert_outputs_to_fp32
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    own = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype)
    if dtype is None or plugin.mixed_precision_policy not in own:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model: Any
    for model in models_of(pipeline_or_model):
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))


def degree_of(accelerator: Any, cp_degree: int | None, ulysses_degree: int | None, ring_degree: int | None) -> int:
    """How many processes share a sequence, from the degrees given and Accelerate's own configuration."""
    named = (ulysses_degree or 1) * (ring_degree or 1)
    configured = getattr(accelerator.parallelism_config, "cp_size", 1) or 1
    both = ulysses_degree is not None and ring_degree is not None
    if cp_degree is None:
        return named if ulysses_degree or ring_degree else configured
    if cp_degree % named or (both and named != cp_degree):
        raise TrainingError(
            f"ulysses_degree={ulysses_degree} and ring_degree={ring_degree} with cp_degree={cp_degree}: their product "
            "must be cp_degree. Leave out one or two of the three, and they are derived."
        )
    return cp_degree


def check_degree(accelerator: Any, cp: int) -> None:
    """Raises TrainingError if `cp` processes cannot share a sequence in this job."""
    world = accelerator.num_processes
    configured = getattr(accelerator.parallelism_config, "cp_size", 1) or 1
    if configured not in (1, cp):
        raise TrainingError(
            f"cp_degree={cp}, but Accelerate's configuration has parallelism_config_cp_size={configured}. Give both "
            "the same number."
        )
    if cp == 1:
        return
    if world == 1:
        raise TrainingError(f"cp_degree={cp}, but this job has one process. {jobs.HOW_TO_LAUNCH}.")
    if world % cp:
        raise TrainingError(
            f"cp_degree={cp} does not divide the {world} processes (--num_processes). Accepted are "
            f"{[degree for degree in range(1, world + 1) if world % degree == 0]}."
        )
    if accelerator.distributed_type == "FSDP" and configured != cp:
        raise TrainingError(
            f"cp_degree={cp} with FSDP2: parameters must also be sharded over processes that share a sequence. "
            f"Set parallelism_config_cp_size: {cp} in Accelerate's parallelism_config (or pass "
            f"--use_parallelism_config --parallelism_config_cp_size {cp} to accelerate launch)."
        )
    loaders = accelerator.dataloader_config
    if loaders.split_batches:
        raise TrainingError(
            f"split_batches=True with cp_degree={cp}: it splits a batch among processes that need the same batch. "
            "Leave it out of Accelerate's DataLoaderConfiguration."
        )
    if loaders.dispatch_batches:
        raise TrainingError(
            f"dispatch_batches=True with cp_degree={cp}: rank 0 distributes parts of a batch to processes that need "
            "the same batch. Set dispatch_batches=False in Accelerate's DataLoaderConfiguration."
        )


def check_no_self_attn(pipeline_or_model: Any) -> None:
    """Raises TrainingError for models with modules named `self_attn`: with FSDP2 and a cp_size, Accelerate's `prepare`
    hooks these modules and drops their masks."""
    for model in models_of(pipeline_or_model):
        for name, _ in model.named_modules():
            if name.split(".")[-1].endswith("self_attn") and type(model).__module__.startswith("diffusers"):
                raise TrainingError(
                    f"{type(model).__name__} has '{name}', whose attention masks Accelerate drops with FSDP2 and "
                    "parallelism_config_cp_size. Train this model with DDP."
                )


def refuse_second_split(*args: Any, **kwargs: Any) -> Any:
    """Takes the place of `accelerator.maybe_context_parallel`."""
    raise TrainingError(
        "accelerator.maybe_context_parallel() would split sequences that diffusers_attn has split already. Remove the "
        "call; nothing replaces it."
    )
