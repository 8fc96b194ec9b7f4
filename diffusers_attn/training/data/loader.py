"""Batches of latents and text embeddings, which threads read ahead of time.

The files are small and memory-mapped, so worker processes would cost more than they gain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .collate import collate, varying
from .errors import TrainingDataError
from .examples import Example
from .latent_cache import CachedLatents
from .masks import with_ones
from .prefetch import prefetch
from .sampler import BatchSampler, Position, Share, Step
from .store import read_shapes, read_tensors
from .text_cache import text_key

Batch = dict[str, Any]


class _Micro(NamedTuple):
    step: Step
    positions: range
    last: bool


class LatentLoader:
    """An endless iterable of this rank's micro-batches.

    A micro-batch is a dict with

    - the latents' tensors [batch, ...], by the names that the encoder returned (`latents_mean`, `latents_logvar`);
    - `loss_mask`, float32 [batch, 1, 1, height, width] of the latents, if one of its examples has a mask; and
      `loss_weight`, float32 [batch];
    - the text's tensors [batch, ...]. If lengths vary within the data, they are padded with zeros to the longest of
      the batch, with a mask `<name>_mask`, bool [batch, length], unless the encoder returned one itself;
    - `captions`, `names` and `bucket` of its examples; a dropped caption is "";
    - `step`, from 0, `epoch`, and `positions`: the position of each example in the step's global batch. Seed random
      numbers by step and position, and they do not depend on the number of processes;
    - `last`: whether it is the rank's last micro-batch of this step.

    Args:
        latents: from `LatentCache.fill`.
        text: from `TextCache.fill`.
        pictured: whether the keys of `text` are captions with pictures.
        sampler: a sampler for the buckets of `latents` in their order, from `LatentLoader.sampler_for`.
        share: this data-parallel rank's share of the global batches. None: all.
        caption_dropout: probability that an example gets the embeddings of the empty caption.
        generator: returns a new generator on the CPU for a step and a position in its global batch, which decides
            whether the caption is dropped, and which one of several is used. It must be the same on all ranks of a
            context-parallel group.
        finish: applied to each micro-batch in the threads that read it.
        threads: number of threads.
        depth: number of micro-batches to read ahead.

    Raises:
        TrainingDataError: a caption has no embeddings; examples have different tensor names or shapes; the global
            batch cannot be divided; or `caption_dropout` is not a probability or has no generator.
    """

    def __init__(
        self,
        latents: Sequence[CachedLatents],
        text: Mapping[Any, Path],
        sampler: BatchSampler,
        share: Share | None = None,
        *,
        pictured: bool = False,
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
            raise TrainingDataError(f"caption_dropout={caption_dropout}: a probability from 0 to 1 is accepted.")
        if caption_dropout and generator is None:
            raise TrainingDataError(f"caption_dropout={caption_dropout} needs generator=..., to draw random numbers.")
        several = next((each.example for each in self.latents if each.example.more_captions), None)
        if several is not None and generator is None:
            raise TrainingDataError(f"{several.name} has several captions, which needs generator=..., to draw one.")
        if threads < 1 or depth < 1:
            raise TrainingDataError(f"threads={threads}, depth={depth}: numbers from 1 are accepted.")
        self.caption_dropout, self._generator, self._finish = caption_dropout, generator, finish
        self._threads, self._depth = threads, depth
        self.pictured = pictured
        unknown = {
            caption
            for each in self.latents
            for caption in ("", *each.example.captions)
            if text_key(each, caption, pictured) not in self.text
        }
        if unknown:
            raise TrainingDataError(f"captions without embeddings: {', '.join(map(repr, sorted(unknown)[:5]))}.")
        self._padded = varying(read_shapes(path) for path in dict.fromkeys(self.text.values()))
        self._position = Position(sampler)

    @staticmethod
    def sampler_for(latents: Sequence[CachedLatents], **settings: Any) -> BatchSampler:
        """A `BatchSampler` for the buckets of `latents`; `settings` are its other arguments."""
        return BatchSampler([each.bucket for each in latents], **settings)

    def __iter__(self) -> Iterator[Batch]:
        """Yields micro-batches from the first unfinished step. A step ends when its last one has been yielded."""
        micros = self._micros(self._position.next_step)
        batches = prefetch(lambda micro: (micro, self._read(micro)), micros, threads=self._threads, depth=self._depth)
        try:
            for micro, batch in batches:
                if micro.last:
                    self._position.next_step = micro.step.number + 1
                yield batch
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in the data for a checkpoint, as JSON values. An unfinished step counts as not begun."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the position at which the next `iter` begins. The number of processes may have changed.

        Raises:
            TrainingDataError: the state is from other batches; see `Position.load_state_dict`.
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
        captions = [self._caption(each.example, step.number, position) for position, each in zip(positions, examples)]
        texts = [self.text[text_key(each, caption, self.pictured)] for each, caption in zip(examples, captions)]
        weights = [each.example.weight for each in examples]
        batch = {
            **collate(with_ones([read_tensors(each.path) for each in examples], "loss_mask")),
            **collate([read_tensors(path) for path in texts], self._padded),
            "loss_weight": torch.tensor(weights),
            "captions": captions,
            "names": [each.example.name for each in examples],
            "bucket": examples[0].bucket,
            "step": step.number,
            "epoch": step.epoch,
            "positions": positions,
            "last": micro.last,
        }
        return batch if self._finish is None else self._finish(batch)

    def _caption(self, example: Example, step: int, position: int) -> str:
        """One of the example's captions, or "" if it is dropped."""
        if self._generator is None or not (self.caption_dropout or example.more_captions):
            return example.caption
        generator = self._generator(step, position)
        # Drawn first, so that further captions do not change which examples lose theirs.
        if (
            self.caption_dropout
            and float(torch.rand((), generator=generator, dtype=torch.float64)) < self.caption_dropout
        ):
            return ""
        if not example.more_captions:
            return example.caption
        return example.captions[int(torch.randint(len(example.captions), (), generator=generator))]
