"""Encodes the training data with a pipeline's VAE and text encoders, and makes the loader of the results."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.clips import with_clips
from ..data.collate import collate, varying
from ..data.conditions import with_conditions
from ..data.examples import Example, read_examples
from ..data.frames import FramePicking
from ..data.latent_cache import CachedLatents, LatentCache
from ..data.loader import LatentLoader
from ..data.pixels import References
from ..data.sampler import Share
from ..data.sound import with_sound
from ..data.store import read_shapes, read_tensors
from ..data.tags import changed_captions
from ..data.text_cache import TextCache, text_key
from ..families import Family
from ..model.pipeline import fingerprint, placed, text_models
from ..parallel import TrainingParallel
from ..randomness import generator
from ..settings.config import TrainConfig
from ..settings.datasets import DataSet
from .buckets import buckets_of
from .captions import encode_captions
from .largest import Assigned, assign, encode_largest, joined, largest


class PreparedData:
    """The encoded training data.

    Attributes:
        latents: cached latents of the training examples.
        text: file of the embeddings of each caption, by its `text_key`.
        pictured: whether embeddings depend on the reference images.
        evaluation: cached latents of the examples for evaluations.
        repeats: number of times that an epoch has each example: one number, or one for each; [] if not known.
        bucket: (frames, height, width) of the first example.
        fps: median frame rate of the training videos; None if unknown or without videos.
        assigned: in a dry run, all examples with their buckets; `latents` then has only one of them.
    """

    def __init__(
        self,
        latents: list[CachedLatents],
        text: dict[Any, Path],
        evaluation: list[CachedLatents],
        picking: FramePicking | None = None,
        assigned: Assigned | None = None,
        repeats: Sequence[int] = (),
        pictured: bool = False,
    ) -> None:
        self.pictured = pictured
        self.latents, self.text, self.evaluation, self.assigned = latents, text, evaluation, assigned
        # One number where all are equal, as runs with a single set of data have stored it in their checkpoints.
        self.repeats = repeats[0] if len(set(repeats)) == 1 else list(repeats)
        self.bucket = tuple(latents[0].bucket)
        picking = picking or FramePicking()
        rates = [
            picking.rate(example.frames, example.fps, bucket.frames)
            for example, bucket, _ in latents
            if example.kind == "video"
        ]
        known = [each for each in rates if each]
        self.fps = statistics.median_low(known) if known else None

    @functools.cached_property
    def padded(self) -> frozenset[str]:
        """Names of the text tensors whose length varies; batches pad them and have a mask for each."""
        return varying(read_shapes(path) for path in dict.fromkeys(self.text.values()))


def prepare_data(config: TrainConfig, family: Family, parallel: TrainingParallel, device: torch.device) -> PreparedData:
    """Reads the examples, and encodes those that are not in the cache. The processes divide the work.

    In a dry run, each process encodes one example.

    Raises:
        TrainingDataError: the data cannot be used, or fit no bucket.
    """
    main = parallel.ranks.rank == 0
    reading: dict[str, Any] = {
        "on_bad_data": config.on_bad_data, "caption_column": config.caption_column,
        "caption_lines": config.caption_lines, "main_process": main, "excluded": [config.output, config.cache],
    }  # fmt: skip
    folders = {name: getattr(config, name) for name in family.example_conditions if getattr(config, name) is not None}
    reading["excluded"] += map(Path, folders.values())
    reading["conditions"] = [name for name in family.example_conditions if name not in folders]
    sources = config.sources
    examples = [_examples(config, source, reading) for source in sources]
    held_out: list[Example] = []
    if config.evaluation_every and config.evaluation_data:
        held_out = _examples(config, DataSet(config.evaluation_data), reading)[: config.evaluation_examples]
    finding: dict[str, Any] = {"numbers": {}, "on_bad_data": config.on_bad_data, "main_process": main}
    examples = [with_conditions(each, family.example_conditions, folders, **finding) for each in examples]
    if held_out:
        held_out = with_conditions(held_out, family.example_conditions, folders, **finding)
    if family.sound_rate is not None:
        sounding: dict[str, Any] = {"on_bad_data": config.on_bad_data, "main_process": main}
        examples = [with_sound(each, **sounding) for each in examples]
        held_out = with_sound(held_out, **sounding) if held_out else []
    weights = fingerprint(family.pipeline.vae)
    caches = [_latent_cache(config, family, weights, source) for source in sources]
    latents = _latent_cache(config, family, weights)
    examples = [
        with_clips(each, cache.buckets, source.clips or config.clips)
        for each, cache, source in zip(examples, caches, sources)
    ]
    text = _text_cache(config, family)
    if config.dry_run:
        parts = [assign(those, cache.buckets, config.on_bad_data, main) for those, cache in zip(examples, caches)]
        repeats = repeats_of(sources, config.repeats, [len(part.examples) for part in parts])
        parts = [part._replace(repeats=number) for part, number in zip(parts, repeats)]
        part, cache = max(zip(parts, caches), key=lambda each: largest(each[0])[0])
        cached, embedded = encode_largest(part, cache, text, family, device)
        pictured = family.text_has_pictures
        return PreparedData(cached, embedded, cached, latents.buckets.picking, joined(parts), pictured=pictured)
    with placed(list(family.encoders.values()), device):
        filling: dict[str, Any] = {
            "ranks": parallel.ranks, "on_bad_data": config.on_bad_data, "batch_size": config.cache_batch_size
        }  # fmt: skip
        filled = [cache.fill(those, family.encode, **filling) for cache, those in zip(caches, examples)]
        cached_held_out = latents.fill(held_out, family.encode, **filling) if held_out else []
    cached = list(itertools.chain.from_iterable(filled))
    with placed(list(text_models(family.pipeline).values()), device):
        embedded = encode_captions(text, family, [*zip(caches, filled), (latents, cached_held_out)], parallel.ranks)
    evaluation = (cached_held_out or cached)[: config.evaluation_examples]
    used = itertools.chain.from_iterable(repeats_of(sources, config.repeats, list(map(len, filled))))
    picking, pictured = latents.buckets.picking, family.text_has_pictures
    return PreparedData(cached, embedded, evaluation, picking, repeats=list(used), pictured=pictured)


def _examples(config: TrainConfig, source: DataSet, reading: dict[str, Any]) -> list[Example]:
    """The examples of a set of data, with its captions, masks and weight."""
    found = read_examples(source.path, **reading, loss_mask=source.loss_mask or config.loss_mask)
    captioned = changed_captions(
        found,
        prefix=source.caption_prefix,
        trigger_word=None if source.regularisation else source.trigger_word or config.trigger_word,
        shuffle_tags=config.shuffle_tags or 1,
        keep_tags=config.keep_tags,
        seed=config.seed,
    )
    return [dataclasses.replace(each, weight=source.weight) for each in captioned]


def repeats_of(sources: Sequence[DataSet], times: int, numbers: Sequence[int]) -> list[list[int]]:
    """The number of times that an epoch has each example of each set of data.

    Args:
        sources: the sets. One for regularisation has as many examples per epoch as all others together, times its
            `repeats`, or each of its examples once if it has more.
        times: `repeats` of the run.
        numbers: number of examples of each set.
    """
    balanced = sum(source.repeats * number for source, number in zip(sources, numbers) if not source.regularisation)
    found = []
    for source, number in zip(sources, numbers):
        each, rest = divmod(source.repeats * balanced, number) if source.regularisation else (source.repeats, 0)
        found.append([times * max(1, each + (i < rest)) for i in range(number)])
    return found


def make_loader(
    config: TrainConfig,
    prepared: PreparedData,
    parallel: TrainingParallel,
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> LatentLoader:
    """A loader of the batches of this process's data-parallel group. Processes that share sequences get the same.

    Args:
        finish: applied to each micro-batch in the threads that read it, such as `Noise`.

    Raises:
        TrainingDataError: the global batch cannot be divided among the processes.
    """
    global_batch = config.batch_size * config.gradient_accumulation_steps * parallel.dp_degree
    sampler = LatentLoader.sampler_for(
        prepared.latents,
        global_batch_size=global_batch,
        seed=config.seed,
        repeats=prepared.repeats or config.repeats,
        incomplete=config.incomplete_batches,
    )
    return LatentLoader(
        prepared.latents,
        prepared.text,
        sampler,
        Share(parallel.dp_rank, parallel.dp_degree, config.batch_size),
        pictured=prepared.pictured,
        caption_dropout=config.caption_dropout,
        generator=lambda step, position: generator(config.seed, "caption", step, position),
        finish=finish,
    )


def _latent_cache(config: TrainConfig, family: Family, weights: str, source: DataSet | None = None) -> LatentCache:
    vae = family.pipeline.vae
    settings = {"vae": type(vae).__name__, "weights": weights, "dtype": str(vae.dtype)}
    if family.conditioned:  # otherwise families with the same VAE share latents
        others = {name: fingerprint(each) for name, each in family.encoders.items() if name != "vae"}
        settings |= {"family": type(family).__name__, **others}
    references = References(family.reference_size, family.references_have_borders)
    buckets = buckets_of(config, family, source)
    cropping: dict[str, Any] = {"crop": config.crop, "seed": config.seed}
    return LatentCache(config.cache, settings, buckets, **cropping, references=references, sound_rate=family.sound_rate)


def _text_cache(config: TrainConfig, family: Family) -> TextCache:
    encoders = text_models(family.pipeline)
    settings: dict[str, Any] = {
        "family": type(family).__name__,
        "weights": {name: fingerprint(each) for name, each in encoders.items()},
        "tokens": family.max_sequence_length,
        "dtype": {name: str(each.dtype) for name, each in encoders.items()},
    }
    return TextCache(config.cache, settings)


def evaluation_batches(prepared: PreparedData, wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Batches of one evaluation example each, in the form of `LatentLoader`, for the indices `wanted`."""
    batches = []
    for number in wanted:
        each = prepared.evaluation[number]
        text = read_tensors(prepared.text[text_key(each, each.example.caption, prepared.pictured)])
        batches.append({**collate([read_tensors(each.path)]), **collate([text], prepared.padded)})
    return batches
