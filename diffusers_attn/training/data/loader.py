"""Batches of latents and text embeddings, read a little ahead by threads.

The files are small and mapped into memory, so that processes of their own for loading would cost more than they give.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache import CachedLatents
from .collate import collate, varying
from .errors import TrainingDataError
from .prefetch import ahead
from .sampler import BatchSampler, Position, Share, Step
from .store import read_shapes, read_tensors

Batch = dict[str, Any]


class _Micro(NamedTuple):
    step: Step
    positions: range
    last: bool


class LatentLoader:
    """This rank's micro-batches, one after the other and without an end.

    Each is a dict of

    - the latents' tensors [batch, ...], by the names that the encoder gave (`latents_mean`, `latents_logvar`);
    - the text's tensors [batch, ...]. Where lengths vary within the data, they are padded with zeros to the longest
      of the batch, and there is a `<name>_mask`, bool [batch, length], unless the encoder gave one itself;
    - `captions`, `names` and `bucket` of its examples; a dropped caption is "";
    - `step`, counted from 0, `epoch`, and `positions`: the place of each example in the step's global batch. What is
      random about an example belongs to its step and position; then it does not matter on how many processes it is
      drawn;
    - `last`: whether it is the rank's last micro-batch of this step.

    Args:
        latents: what `LatentCache.fill` returned.
        text: what `TextCache.fill` returned.
        sampler: made for the buckets of `latents`, in their order; `LatentLoader.sampler_for` makes one.
        share: the part of this data-parallel rank.
        caption_dropout: the probability that an example is given the empty caption's text.
        generator: for a step and a position in its global batch, a new generator on the CPU, which decides about the
            caption there. It must be the same on all ranks of a context-parallel group.
        finish: what the threads that read a batch still do with it; what it returns is given.
        threads: that read.
        depth: how many micro-batches are read ahead.

    Raises:
        TrainingDataError: a caption is not in `text`; shapes or names differ where they must not; the global batch
            cannot be divided; a probability outside of 0 to 1, or one without a generator.
    """

    def __init__(
        self,
        latents: Sequence[CachedLatents],
        text: Mapping[str, Path],
        sampler: BatchSampler,
        share: Share | None = None,
        *,
        caption_dropout: float = 0.0,
        generator: Callable[[int, int], torch.Generator] | None = None,
        finish: Callable[[Batch], Batch] | None = None,
        threads: int = 2,
        depth: int = 4,
    ) -> None:
        self.latents, self.text, self.sampler, self.share = list(latents), dict(text), sampler, share or Share()
        self._positions = self.share.positions(sampler.global_batch_size)
        self.accumulation_steps = len(self._positions)
        if not 0 <= caption_dropout <= 1:
            raise TrainingDataError(f"caption_dropout={caption_dropout}; it is a probability, from 0 to 1.")
        if caption_dropout and generator is None:
            raise TrainingDataError(f"caption_dropout={caption_dropout} needs generator=..., which decides about it.")
        if threads < 1 or depth < 1:
            raise TrainingDataError(f"threads={threads}, depth={depth}; they are 1 or more.")
        self.caption_dropout, self._generator, self._finish = caption_dropout, generator, finish
        self._threads, self._depth = threads, depth
        unknown = {each.example.caption for each in self.latents} | {""}
        unknown -= self.text.keys()
        if unknown:
            raise TrainingDataError(f"captions without embeddings: {', '.join(map(repr, sorted(unknown)[:5]))}.")
        self._padded = varying(read_shapes(path) for path in dict.fromkeys(self.text.values()))
        self._position = Position(sampler)

    @staticmethod
    def sampler_for(latents: Sequence[CachedLatents], **settings: Any) -> BatchSampler:
        """A `BatchSampler` for the buckets of `latents`; `settings` are its own."""
        return BatchSampler([each.bucket for each in latents], **settings)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from the next step on that is not done. A step is done once its last micro-batch is given."""
        micros = self._micros(self._position.next_step)
        batches = ahead(lambda micro: (micro, self._read(micro)), micros, threads=self._threads, depth=self._depth)
        try:
            for micro, batch in batches:
                if micro.last:
                    self._position.next_step = micro.step.number + 1
                yield batch
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, for a checkpoint; JSON can say it. Between the micro-batches of a step it is the
        beginning of the step."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, on any number of processes, with the next `iter`.

        Raises:
            TrainingDataError: it is of other batches; see `Position.load_state_dict`.
        """
        self._position.load_state_dict(state)

    def _micros(self, first: int) -> Iterator[_Micro]:
        for number in itertools.count(first):
            step = self.sampler.step(number)
            for i, positions in enumerate(self._positions):
                yield _Micro(step, positions, i == len(self._positions) - 1)

    def _read(self, micro: _Micro) -> Batch:
        step, positions = micro.step, list(micro.positions)
        examples = [self.latents[step.indices[position]] for position in positions]
        captions = [
            "" if self._dropped(step.number, position) else each.example.caption
            for position, each in zip(positions, examples)
        ]
        batch = {
            **collate([read_tensors(each.path) for each in examples]),
            **collate([read_tensors(self.text[caption]) for caption in captions], self._padded),
            "captions": captions,
            "names": [each.example.name for each in examples],
            "bucket": examples[0].bucket,
            "step": step.number,
            "epoch": step.epoch,
            "positions": positions,
            "last": micro.last,
        }
        return batch if self._finish is None else self._finish(batch)

    def _dropped(self, step: int, position: int) -> bool:
        if not self.caption_dropout or self._generator is None:
            return False
        drawn = torch.rand((), generator=self._generator(step, position), dtype=torch.float64)
        return float(drawn) < self.caption_dropout
