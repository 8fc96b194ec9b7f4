"""A dry run: everything that a run does up to its first step, with a single example, and a report of what to expect."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .base_precision import inner_tensors
from .config import TrainConfig
from .data.buckets import Bucket, Buckets
from .data.cache import LatentCache, TextCache
from .data.disk import human_size
from .data.errors import Problem, TrainingDataError, report_problems
from .data.examples import Example
from .data.sampler import BatchSampler
from .families import Family
from .models import placed, text_encoders


class Assigned(NamedTuple):
    """The usable training examples, with the bucket of each and the number of times that an epoch has it."""

    examples: list[Example]
    buckets: list[Bucket]
    repeats: list[int]


def assign(examples: list[Example], buckets: Buckets, repeats: int, on_bad_data: str, main_process: bool) -> Assigned:
    """Finds the bucket of every example without decoding it.

    Raises:
        TrainingDataError: examples fit no bucket, and `on_bad_data` is "refuse".
    """
    usable, found, problems = [], [], []
    for example in examples:
        try:
            found.append(buckets.bucket(example))
            usable.append(example)
        except TrainingDataError as error:
            problems.append(Problem(example.name, str(error)))
    report_problems(problems, len(usable), f"{len(examples)} examples", on_bad_data, main_process=main_process)
    return Assigned(usable, found, [repeats] * len(usable))


def largest(assigned: Assigned) -> tuple[int, int]:
    """The size of the largest bucket in pixels of all frames, and the index of an example in it."""
    sizes = [each.frames * each.height * each.width for each in assigned.buckets]
    return max(sizes), sizes.index(max(sizes))


def joined(parts: Sequence[Assigned]) -> Assigned:
    """The examples of several sets of data."""
    return Assigned(*(list(itertools.chain.from_iterable(each)) for each in zip(*parts)))


def encode_largest(
    assigned: Assigned, latents: LatentCache, text: TextCache, family: Family, device: torch.device
) -> tuple[list[Any], dict[str, Path]]:
    """Encodes an example of the largest bucket, which needs the most memory, with its caption.

    Every process encodes the same example into a cache of its own.

    Returns:
        What `LatentCache.fill` and `TextCache.fill` return.
    """
    example = assigned.examples[largest(assigned)[1]]
    with placed(list(family.encoders.values()), device):
        cached = latents.fill([example], family.encode)
    with placed(list(text_encoders(family.pipeline).values()), device):
        return cached, text.fill(example.captions, family.encode_text)


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
        f"  adapter    {config.adapter} of rank {config.rank}, {sum(each.numel() for each in trained):,} weights",
        f"  processes  {dp_degree} x {cp_degree} (data x context parallel), {batch} examples per step",
        f"  memory     {human_size(memory['training'])} {where} in a step of the largest bucket: base model "
        f"{human_size(held)}, adapter with gradient and optimizer {human_size(adapter)}, other tensors "
        f"{human_size(max(rest, 0))}; {human_size(memory['encoding'])} while data are encoded",
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
