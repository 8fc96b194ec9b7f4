"""The report of a dry run: everything that a run does up to its first step, with a single example."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..batches.largest import Assigned
from ..data.disk import human_size
from ..data.sampler import BatchSampler
from ..families import Family
from ..model.base_precision import inner_tensors
from ..settings.config import TrainConfig


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of `peak_memory`. On a CPU, it goes on counting from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def summary(
    config: TrainConfig,
    family: Family,
    assigned: Assigned,
    degrees: tuple[int, int],
    memory: dict[str, int],
    optimizer: torch.optim.Optimizer,
    loss: float,
    compiling: str,
) -> str:
    """The report of a dry run, of several lines.

    Args:
        config: the settings.
        family: the family, whose trained transformers have adapters.
        assigned: all examples with their buckets.
        degrees: numbers of data-parallel groups, and of processes in each.
        memory: peak memory in bytes of "encoding" and of "training".
        optimizer: the optimizer after one step.
        loss: loss of that step.
        compiling: whether blocks are compiled, and why.
    """
    dp_degree, cp_degree = degrees
    batch = config.batch_size * config.gradient_accumulation_steps * dp_degree
    sampler = BatchSampler(
        assigned.buckets, global_batch_size=batch, repeats=assigned.repeats, incomplete=config.incomplete_batches
    )
    epoch = sampler.steps_per_epoch
    parameters = [each for transformer in family.trained.values() for each in transformer.parameters()]
    trained = [each for each in parameters if each.requires_grad]
    device = trained[0].device
    frozen = [each for each in parameters if not each.requires_grad]
    weights = sum(map(size_of, frozen))
    held = sum(size_of(each) for each in frozen if each.device == device)
    state = [each for state in optimizer.state.values() for each in _tensors(state)]
    adapter = 2 * sum(map(size_of, trained)) + sum(map(size_of, state))
    rest = memory["training"] - held - adapter
    counts = Counter(assigned.buckets)
    where = "of the GPU" if device.type == "cuda" else "of this process"
    lines = [
        f"dry run of {epoch} steps per epoch; {config.steps} steps are {config.steps / epoch:.3g} epochs. "
        "Nothing was written.",
        f"  model      {type(family.pipeline).__name__}, base model of {human_size(weights)}",
        f"  adapter    {config.adapter_with_rank}, {sum(each.numel() for each in trained):,} weights",
        f"  processes  {dp_degree} x {cp_degree} (data x context parallel), {batch} examples per step",
        f"  memory     {human_size(memory['training'])} {where} in a step of the largest bucket: base model "
        f"{human_size(held)}, adapter with gradient and optimizer {human_size(adapter)}, other tensors "
        f"{human_size(max(rest, 0))}; {human_size(memory['encoding'])} while data are encoded",
        f"  compile    {compiling}",
        f"  loss       {loss:.4f} in the first step",
        f"  data       {len(assigned.examples)} examples in {len(counts)} bucket{'s' if len(counts) > 1 else ''} "
        "(frames x height x width):",
        *(f"             {bucket}: {number} examples" for bucket, number in sorted(counts.items())),
    ]
    return "\n".join(lines)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor on this process. Of a quantised tensor, those of the tensors that it consists of."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # FSDP2
    return sum(each.numel() * each.element_size() for each in inner_tensors(local).values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in value.values() for each in _tensors(part)] if isinstance(value, dict) else []
