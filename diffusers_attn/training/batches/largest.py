"""All examples with their buckets, and one of the largest bucket, encoded: the data of a dry run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.buckets import Bucket, Buckets
from ..data.errors import Problem, TrainingDataError, report_problems
from ..data.examples import Example
from ..data.latent_cache import LatentCache
from ..data.ranks import OneRank
from ..data.text_cache import TextCache
from ..families import Family
from ..model.pipeline import placed, text_models
from .captions import encode_captions


class Assigned(NamedTuple):
    """The usable training examples, with the bucket of each and the number of times that an epoch has it."""

    examples: list[Example]
    buckets: list[Bucket]
    repeats: list[int]


def assign(examples: list[Example], buckets: Buckets, on_bad_data: str, main_process: bool) -> Assigned:
    """Finds the bucket of every example without decoding it. Each has one repeat.

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
    return Assigned(usable, found, [1] * len(usable))


def largest(assigned: Assigned) -> tuple[int, int]:
    """The size of the largest bucket in pixels of all frames, and the index of an example in it."""
    sizes = [each.frames * each.height * each.width for each in assigned.buckets]
    return max(sizes), sizes.index(max(sizes))


def joined(parts: Sequence[Assigned]) -> Assigned:
    """The examples of several sets of data."""
    return Assigned(*(list(itertools.chain.from_iterable(each)) for each in zip(*parts)))


def encode_largest(
    assigned: Assigned, latents: LatentCache, text: TextCache, family: Family, device: torch.device
) -> tuple[list[Any], dict[Any, Path]]:
    """Encodes an example of the largest bucket, which needs the most memory, with its caption.

    Every process encodes the same example into a cache of its own.

    Returns:
        What `LatentCache.fill` and `TextCache.fill` return.
    """
    example = assigned.examples[largest(assigned)[1]]
    with placed(list(family.encoders.values()), device):
        cached = latents.fill([example], family.encode)
    with placed(list(text_models(family.pipeline).values()), device):
        return cached, encode_captions(text, family, [(latents, cached)], OneRank())
