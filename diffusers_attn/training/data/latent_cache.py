"""A cache of the latents of images and videos.

Nothing is encoded twice, and the VAE takes no memory during training. Results are kept in safetensors files named by a
hash of the content of the image or video and the encoder's settings. The processes of a job divide the work. Jobs that
share a cache fill it one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...json_files import read_json
from .buckets import Bucket, Buckets
from .digests import content_digests
from .disk import write_file
from .encoding import FORMAT, check_positive, check_shared, naming, rows_of
from .errors import Problem, TrainingDataError, check_on_bad_data, report_problems
from .examples import Example
from .lock import alone_in
from .masks import latent_mask
from .pixels import Pixels, References, read_pixels, read_references
from .prefetch import prefetch
from .ranks import OneRank, Ranks, in_step
from .sound import Span, read_sound, span_of
from .store import TensorStore, hash_of

Encode = Callable[..., Mapping[str, Tensor]]
"""Encodes pixels, float32 [batch, 3, frames, height, width] in [-1, 1], to tensors [batch, ...] by name. The conditions
of examples that have any are keyword arguments: reference images, `references`, [batch, number, 3, height, width]; the
others as the pixels; and `sound`, [batch, 2, samples], if it is read."""


class CachedLatents(NamedTuple):
    """An example with its bucket and the file of its latents."""

    example: Example
    bucket: Bucket
    path: Path


class _Work(NamedTuple):
    key: str
    made_from: dict[str, Any]
    example: Example
    bucket: Bucket
    numbers: list[int]
    span: Span | None
    """The part of the video whose sound is read; None if none is."""


class LatentCache:
    """A cache of examples' latents. Those of an example with a mask of the loss have it as `loss_mask`, see `masks`.

    Args:
        folder: folder of the cache, which all ranks can access.
        settings: JSON values that determine the latents besides the pixels: model, revision, the VAE's configuration,
            dtype. Other settings have other files.
        buckets: sizes to which examples are resized.
        crop: "centre", or "random" for a part of each example that depends only on its content and on `seed`.
        seed: seed of random crops.
        references: how reference images are resized.
        sound_rate: samples per second of the sound of videos, whose frames are picked at a fixed rate. None: sound is
            not read.

    Raises:
        TrainingDataError: settings that cannot be stored as JSON.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        buckets: Buckets,
        *,
        crop: str = "centre",
        seed: int = 0,
        references: References = References(),  # noqa: B008,
        sound_rate: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.buckets, self.crop, self.seed, self.references = buckets, crop, seed, references
        self.sound_rate = sound_rate
        self._works: dict[str, _Work] = {}
        self.store = TensorStore(self.folder / "latents")
        hash_of(self.settings)

    def fill(
        self,
        examples: Sequence[Example],
        encode: Encode,
        *,
        ranks: Ranks | None = None,
        on_bad_data: str = "refuse",
        batch_size: int = 1,
        decoding_threads: int = 2,
    ) -> list[CachedLatents]:
        """Encodes the examples that are not in the cache. All ranks must call this with the same examples.

        Args:
            examples: the examples.
            encode: encodes pixels on the CPU, float32 [batch, 3, frames, height, width] in [-1, 1], to tensors
                [batch, ...] by name. Return a distribution as `latents_mean` and `latents_logvar`, so that training
                can draw a new sample each time.
            ranks: the processes that divide the work. None: this process alone.
            on_bad_data: "refuse" or "skip" examples that cannot be decoded or fit no bucket.
            batch_size: number of examples encoded at once. With 1, results do not depend on the other examples.
            decoding_threads: number of threads that decode ahead of the encoder.

        Returns:
            The usable examples in their order.

        Raises:
            TrainingDataError: there are problems and `on_bad_data` is "refuse"; no example is usable; `encode` returned
                NaN, infinity or another batch size; or the ranks do not share the folder.
            OtherRankError: encoding failed on another rank.
        """
        check_on_bad_data(on_bad_data)
        check_positive(batch_size=batch_size, decoding_threads=decoding_threads)
        ranks = ranks or OneRank()
        with alone_in(self.folder, ranks, "the cache"):
            return self._fill(examples, encode, ranks, on_bad_data, batch_size, decoding_threads)

    def _fill(
        self,
        examples: Sequence[Example],
        encode: Encode,
        ranks: Ranks,
        on_bad_data: str,
        batch_size: int,
        decoding_threads: int,
    ) -> list[CachedLatents]:
        work, problems = self._work(examples, ranks)
        self._works |= {each.key: each for each in work.values()}
        distinct = sorted({each.key: each for each in work.values()}.values(), key=lambda each: (each.bucket, each.key))
        mine = [each for each in distinct[ranks.rank :: ranks.size] if not self.store.has(each.key)]
        for each in mine:
            self._problem_file(each.key).unlink(missing_ok=True)
            # A damaged file must not stay in case the example cannot be encoded again.
            self.store.path(each.key).unlink(missing_ok=True)
        refusing = on_bad_data == "refuse" and bool(problems)

        def encode_batch(batch: list[tuple[_Work, Pixels | TrainingDataError]]) -> None:
            nonlocal refusing
            good: list[tuple[_Work, Pixels]] = []
            for item, pixels in batch:
                if isinstance(pixels, Pixels):
                    good.append((item, pixels))
                    continue
                self._record_problem(item.key, str(pixels))
                refusing = refusing or on_bad_data == "refuse"
            if good and not refusing:  # after a refused problem, the rest is only checked
                self._encode(good, encode)

        def pixels_of(batch: list[_Work]) -> list[tuple[_Work, Pixels | TrainingDataError]]:
            return [(each, self._pixels(each)) for each in batch]

        decoded = prefetch(pixels_of, _batches(mine, batch_size), threads=decoding_threads, depth=decoding_threads)
        with contextlib.closing(decoded):
            in_step(ranks, decoded, encode_batch, "encoding images and videos")
        return self._outcome(examples, work, problems, on_bad_data, ranks)

    def _work(self, examples: Sequence[Example], ranks: Ranks) -> tuple[dict[int, _Work], dict[int, str]]:
        """The work for each example by its index, and the problem of each that has no bucket."""
        self.store.remove_unfinished()
        digests = content_digests([example.source for example in examples], self.folder / "digests", ranks)
        conditions = [each.source for example in examples for each in itertools.chain(*example.conditions.values())]
        of_conditions = iter(content_digests(conditions, self.folder / "digests", ranks) if conditions else [])
        masks = [example.mask.source for example in examples if example.mask is not None]
        of_masks = iter(content_digests(masks, self.folder / "digests", ranks) if masks else [])
        work: dict[int, _Work] = {}
        problems: dict[int, str] = {}
        for i, (example, digest) in enumerate(zip(examples, digests)):
            given = {name: [next(of_conditions) for _ in each] for name, each in example.conditions.items()}
            mask = None if example.mask is None else [next(of_masks), example.mask.channel]
            try:
                bucket = self.buckets.bucket(example)
                numbers = self.buckets.numbers(example, bucket)
            except TrainingDataError as error:
                problems[i] = str(error)
                continue
            made_from: dict[str, Any] = {
                "format": FORMAT,
                "content": digest,
                "bucket": list(bucket),
                "frames": numbers,
                "crop": self.crop if self.crop == "centre" else [self.crop, self.seed],
                "settings": self.settings,
                **given,
                **({"mask": mask} if mask else {}),
            }
            span = None
            if self.sound_rate is not None and self.buckets.picking.fps is not None:
                span = span_of(example, bucket, numbers, self.buckets.picking.fps)
                made_from["sound"] = [self.sound_rate, *span]
            work[i] = _Work(hash_of(made_from), made_from, example, bucket, numbers, span)
        return work, problems

    def _pixels(self, work: _Work) -> Pixels | TrainingDataError:
        try:
            found = read_pixels(work.example, work.bucket, work.numbers, self.references, **self._cropping(work))
            if self.sound_rate is not None and work.span is not None:
                found.given["sound"] = read_sound(work.example.source, work.span, self.sound_rate)
            return found
        except TrainingDataError as error:
            return error

    def _cropping(self, work: _Work) -> dict[str, Any]:
        # The seed depends on the content, not on the example's position in the data.
        return {"crop": self.crop, "seed": self.seed ^ int(work.made_from["content"][:12], 16)}

    def references_of(self, key: str) -> Tensor:
        """The reference images of an example that `fill` returned, as `encode` got them for a batch of one.

        Args:
            key: stem of the file of its latents.
        """
        work = self._works[key]
        given = work.example.conditions["references"]
        return read_references(given, work.bucket, self.references, **self._cropping(work))[None]

    def _encode(self, good: list[tuple[_Work, Pixels]], encode: Encode) -> None:
        pixels = torch.stack([each.frames for _, each in good]).transpose(1, 2)
        given = {name: torch.stack([each.given[name] for _, each in good]) for name in good[0][1].given}
        names = [each.example.name for each, _ in good]
        with torch.no_grad(), naming("encoding", names):
            rows = rows_of(encode(pixels, **given), names)
        for (each, (*_, mask)), tensors in zip(good, rows):
            if mask is not None:
                tensors["loss_mask"] = latent_mask(mask, tensors["latents_mean"])
            self.store.write(each.key, tensors, each.made_from)

    def _outcome(
        self,
        examples: Sequence[Example],
        work: Mapping[int, _Work],
        problems: dict[int, str],
        on_bad_data: str,
        ranks: Ranks,
    ) -> list[CachedLatents]:
        ranks.barrier()
        cached = []
        missing = []
        for i, each in work.items():
            path, problem = self.store.path(each.key), self._problem_file(each.key)
            if path.is_file():
                cached.append(CachedLatents(examples[i], each.bucket, path))
            elif problem.is_file():
                problems[i] = _reason(problem)
            else:
                missing.append(examples[i].name)
        named = [Problem(examples[i].name, reason) for i, reason in sorted(problems.items())]
        # After a refused problem nothing was encoded, so files may be missing.
        check_shared([] if named and on_bad_data == "refuse" else missing, self.folder, ranks)
        usable = len(examples) - len(named)
        report_problems(named, usable, f"{len(examples)} examples", on_bad_data, main_process=ranks.rank == 0)
        return cached

    def _record_problem(self, key: str, reason: str) -> None:
        write_file(self._problem_file(key), lambda path: path.write_text(json.dumps({"reason": reason})))

    def _problem_file(self, key: str) -> Path:
        """A file that tells the other ranks why an example cannot be decoded. Later runs try to decode it again."""
        return self.folder / "problems" / f"{key}.json"


def _batches(work: Sequence[_Work], batch_size: int) -> list[list[_Work]]:
    """Divides work, sorted by bucket, into batches of one bucket each."""
    batches: list[list[_Work]] = []
    for each in work:
        if batches and batches[-1][0].bucket == each.bucket and len(batches[-1]) < batch_size:
            batches[-1].append(each)
        else:
            batches.append([each])
    return batches


def _reason(problem: Path) -> str:
    try:
        return str(read_json(problem)["reason"])
    except (OSError, ValueError, KeyError, TypeError):  # the file is damaged
        return "it cannot be decoded"
