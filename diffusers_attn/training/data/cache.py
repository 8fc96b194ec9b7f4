"""Caches of latents and text embeddings.

Nothing is encoded twice, and the VAE and the text encoders take no memory during training. Results are kept in
safetensors files named by a hash of the content of the image or video (or of the caption) and the encoder's settings.
The processes of a job divide the work. Jobs that share a cache fill it one after the other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...json_files import read_json
from . import decode
from .buckets import Bucket, Buckets
from .digests import content_digests
from .disk import write_file
from .errors import Problem, TrainingDataError, check_on_bad_data, report_problems
from .examples import Example
from .lock import alone_in
from .masks import latent_mask
from .prefetch import prefetch
from .ranks import OneRank, Ranks, in_step
from .resize_crop import resize_crop
from .store import TensorStore, hash_of

_FORMAT = 1
"""Version of the preprocessing. Increase it if the same settings give other pixels; files are then computed again."""

Encode = Callable[..., Mapping[str, Tensor]]
"""Encodes pixels, float32 [batch, 3, frames, height, width] in [-1, 1], to tensors [batch, ...] by name. The reference
images of examples that have any are the second argument, float32 [batch, number, 3, height, width] in [-1, 1]."""
EncodeText = Callable[..., Mapping[str, Tensor]]
"""Encodes a list of captions to tensors [batch, ...] by name. The reference images of captions that have any are the
second argument, as in `Encode`."""
ReferenceSize = Callable[[int, int], tuple[int, int]]
"""Height and width of the reference images of an example with a height and width."""


CaptionT = TypeVar("CaptionT", bound="str | PicturedCaption")


class CachedLatents(NamedTuple):
    """An example with its bucket and the file of its latents."""

    example: Example
    bucket: Bucket
    path: Path


class PicturedCaption(NamedTuple):
    """A caption whose embeddings depend on its example's reference images."""

    caption: str
    pictures: str
    """Key of the example's latents, which covers the images and what is done to them."""


class _Work(NamedTuple):
    key: str
    made_from: dict[str, Any]
    example: Example
    bucket: Bucket
    numbers: list[int]


class _Pixels(NamedTuple):
    frames: Tensor
    references: Tensor | None
    """[number, 3, height, width]; None without reference images."""
    mask: Tensor | None
    """The mask of its loss, [1, 1, height, width] in [0, 1]."""


class LatentCache:
    """A cache of examples' latents. Those of an example with a mask of the loss have it as `loss_mask`, see `masks`.

    Args:
        folder: folder of the cache, which all ranks can access.
        settings: JSON values that determine the latents besides the pixels: model, revision, the VAE's configuration,
            dtype. Other settings have other files.
        buckets: sizes to which examples are resized.
        crop: "centre", or "random" for a part of each example that depends only on its content and on `seed`.
        seed: seed of random crops.
        reference_size: the size to which reference images are resized. None: that of their example.

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
        reference_size: ReferenceSize | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.buckets, self.crop, self.seed, self.reference_size = buckets, crop, seed, reference_size
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
        _check_positive(batch_size=batch_size, decoding_threads=decoding_threads)
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

        def encode_batch(batch: list[tuple[_Work, _Pixels | TrainingDataError]]) -> None:
            nonlocal refusing
            good: list[tuple[_Work, _Pixels]] = []
            for item, pixels in batch:
                if isinstance(pixels, _Pixels):
                    good.append((item, pixels))
                    continue
                self._record_problem(item.key, str(pixels))
                refusing = refusing or on_bad_data == "refuse"
            if good and not refusing:  # after a refused problem, the rest is only checked
                self._encode(good, encode)

        def pixels_of(batch: list[_Work]) -> list[tuple[_Work, _Pixels | TrainingDataError]]:
            return [(each, self._pixels(each)) for each in batch]

        decoded = prefetch(pixels_of, _batches(mine, batch_size), threads=decoding_threads, depth=decoding_threads)
        with contextlib.closing(decoded):
            in_step(ranks, decoded, encode_batch, "encoding images and videos")
        return self._outcome(examples, work, problems, on_bad_data, ranks)

    def _work(self, examples: Sequence[Example], ranks: Ranks) -> tuple[dict[int, _Work], dict[int, str]]:
        """The work for each example by its index, and the problem of each that has no bucket."""
        self.store.remove_unfinished()
        digests = content_digests([example.source for example in examples], self.folder / "digests", ranks)
        references = [each for example in examples for each in example.references]
        of_references = iter(content_digests(references, self.folder / "digests", ranks) if references else [])
        masks = [example.mask.source for example in examples if example.mask is not None]
        of_masks = iter(content_digests(masks, self.folder / "digests", ranks) if masks else [])
        work: dict[int, _Work] = {}
        problems: dict[int, str] = {}
        for i, (example, digest) in enumerate(zip(examples, digests)):
            given = [next(of_references) for _ in example.references]
            mask = None if example.mask is None else [next(of_masks), example.mask.channel]
            try:
                bucket = self.buckets.bucket(example)
                numbers = self.buckets.numbers(example, bucket)
            except TrainingDataError as error:
                problems[i] = str(error)
                continue
            made_from = {
                "format": _FORMAT,
                "content": digest,
                "bucket": list(bucket),
                "frames": numbers,
                "crop": self.crop if self.crop == "centre" else [self.crop, self.seed],
                "settings": self.settings,
                **({"references": given} if given else {}),
                **({"mask": mask} if mask else {}),
            }
            work[i] = _Work(hash_of(made_from), made_from, example, bucket, numbers)
        return work, problems

    def _pixels(self, work: _Work) -> _Pixels | TrainingDataError:
        try:
            frames = resize_crop(decode.read(work.example, work.numbers), work.bucket, **self._cropping(work))
            return _Pixels(frames, self._references(work), self._mask(work))
        except TrainingDataError as error:
            return error

    def _references(self, work: _Work) -> Tensor | None:
        height, width = work.bucket.height, work.bucket.width
        height, width = (height, width) if self.reference_size is None else self.reference_size(height, width)
        size, how = Bucket(1, height, width), self._cropping(work)
        found = [resize_crop([decode.read_image(each)], size, **how) for each in work.example.references]
        return torch.cat(found) if found else None

    def _mask(self, work: _Work) -> Tensor | None:
        """The mask of an example, resized and cropped as its frames."""
        if work.example.mask is None:
            return None
        one = work.bucket._replace(frames=1)
        mask = (resize_crop([decode.read_mask(*work.example.mask)], one, **self._cropping(work)) + 1) / 2
        if not bool(mask.any()):
            raise TrainingDataError("its mask leaves out everything in its bucket")
        return mask

    def _cropping(self, work: _Work) -> dict[str, Any]:
        # The seed depends on the content, not on the example's position in the data.
        return {"crop": self.crop, "seed": self.seed ^ int(work.made_from["content"][:12], 16)}

    def references_of(self, key: str) -> Tensor:
        """The reference images of an example that `fill` returned, as `encode` got them for a batch of one.

        Args:
            key: stem of the file of its latents.
        """
        references = self._references(self._works[key])
        assert references is not None
        return references[None]

    def _encode(self, good: list[tuple[_Work, _Pixels]], encode: Encode) -> None:
        pixels = torch.stack([each.frames for _, each in good]).transpose(1, 2)
        references = [each.references for _, each in good if each.references is not None]
        names = [each.example.name for each, _ in good]
        with torch.no_grad(), _naming("encoding", names):
            rows = _rows(encode(pixels, torch.stack(references)) if references else encode(pixels), names)
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
        _check_shared([] if named and on_bad_data == "refuse" else missing, self.folder, ranks)
        usable = len(examples) - len(named)
        report_problems(named, usable, f"{len(examples)} examples", on_bad_data, main_process=ranks.rank == 0)
        return cached

    def _record_problem(self, key: str, reason: str) -> None:
        write_file(self._problem_file(key), lambda path: path.write_text(json.dumps({"reason": reason})))

    def _problem_file(self, key: str) -> Path:
        """A file that tells the other ranks why an example cannot be decoded. Later runs try to decode it again."""
        return self.folder / "problems" / f"{key}.json"


class TextCache:
    """A cache of captions' embeddings.

    Args:
        folder: folder of the cache, which all ranks can access.
        settings: JSON values that determine the embeddings besides the caption: model, revision, lengths, dtype.

    Raises:
        TrainingDataError: settings that cannot be stored as JSON.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.store = TensorStore(self.folder / "text")
        hash_of(self.settings)

    def path(self, caption: str | PicturedCaption) -> Path:
        """Path of the embeddings of `caption`, which need not exist."""
        return self.store.path(hash_of(self._made_from(caption)))

    def fill(
        self,
        captions: Iterable[CaptionT],
        encode_text: EncodeText,
        *,
        ranks: Ranks | None = None,
        batch_size: int = 1,
        references: Callable[[str], Tensor] | None = None,
    ) -> dict[CaptionT, Path]:
        """Encodes the captions that are not in the cache. All ranks must call this with the same captions.

        Args:
            captions: the captions: all texts, or all with pictures. The empty caption, which replaces dropped ones, is
                always added, with each example's pictures if captions have some.
            encode_text: encodes captions to tensors [batch, ...] by name.
            ranks: the processes that divide the work. None: this process alone.
            batch_size: number of captions encoded at once. An encoder that pads to the longest caption of a batch
                needs 1, for embeddings that do not depend on the other captions. Captions with pictures need 1.
            references: the pictures for a key of `PicturedCaption`, such as `LatentCache.references_of`.

        Returns:
            The file of each caption, including the empty ones.

        Raises:
            TrainingDataError: `encode_text` returned NaN, infinity or another batch size, or the ranks do not share the
                folder.
            OtherRankError: encoding failed on another rank.
        """
        _check_positive(batch_size=batch_size)
        ranks = ranks or OneRank()
        with alone_in(self.folder, ranks, "the cache"):
            return self._fill(captions, encode_text, ranks, batch_size, references)

    def _fill(
        self,
        captions: Iterable[CaptionT],
        encode_text: EncodeText,
        ranks: Ranks,
        batch_size: int,
        references: Callable[[str], Tensor] | None,
    ) -> dict[CaptionT, Path]:
        self.store.remove_unfinished()
        distinct: Any = {*captions}
        if references is None:
            distinct = sorted(distinct | {""})
        else:
            batch_size = 1
            distinct = sorted(distinct | {PicturedCaption("", each.pictures) for each in distinct})
        mine = [text for text in distinct[ranks.rank :: ranks.size] if not self.store.has(self._key(text))]

        def encode(batch: list[Any]) -> None:
            texts = batch if references is None else [each.caption for each in batch]
            names = [repr(text) for text in texts]
            with torch.no_grad(), _naming("encoding the captions", names):
                pictures = () if references is None else (references(batch[0].pictures),)
                rows = _rows(encode_text(texts, *pictures), names)
            for caption, tensors in zip(batch, rows):
                self.store.write(self._key(caption), tensors, self._made_from(caption))

        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        in_step(ranks, batches, encode, "encoding captions")
        ranks.barrier()
        paths = {caption: self.path(caption) for caption in distinct}
        _check_shared([repr(caption) for caption, path in paths.items() if not path.is_file()], self.folder, ranks)
        return paths

    def _made_from(self, caption: str | PicturedCaption) -> dict[str, Any]:
        of = caption._asdict() if isinstance(caption, PicturedCaption) else {"caption": caption}
        return {"format": _FORMAT, **of, "settings": self.settings}

    def _key(self, caption: str | PicturedCaption) -> str:
        return hash_of(self._made_from(caption))


def text_key(latents: CachedLatents, caption: str, pictured: bool) -> Any:
    """The key of an example's caption in what `TextCache.fill` returns: a `PicturedCaption` if `pictured`."""
    return PicturedCaption(caption, latents.path.stem) if pictured else caption


def _batches(work: Sequence[_Work], batch_size: int) -> list[list[_Work]]:
    """Divides work, sorted by bucket, into batches of one bucket each."""
    batches: list[list[_Work]] = []
    for each in work:
        if batches and batches[-1][0].bucket == each.bucket and len(batches[-1]) < batch_size:
            batches[-1].append(each)
        else:
            batches.append([each])
    return batches


def _rows(tensors: Mapping[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """Splits tensors [batch, ...] into a dict of tensors for each of `names`. Raises TrainingDataError."""
    listed = ", ".join(names)
    if not tensors:
        raise TrainingDataError(f"the encoder returned no tensors for {listed}.")
    for name, tensor in tensors.items():
        if tensor.ndim < 1 or tensor.shape[0] != len(names):
            raise TrainingDataError(
                f"the encoder returned {name!r} of shape {list(tensor.shape)} for {listed}; the first dimension must "
                f"be {len(names)}, one for each."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingDataError(
                f"the encoder returned {name!r} with NaN or infinity for {listed}. Some VAEs and text encoders "
                "overflow in half precision; compute in float32 with mixed_precision='no'."
            )
    # Copies, since safetensors would write a view with its entire storage.
    return [{name: tensor[i].detach().cpu().clone() for name, tensor in tensors.items()} for i in range(len(names))]


@contextlib.contextmanager
def _naming(what: str, names: Sequence[str]) -> Iterator[None]:
    """Adds a note with `what` and `names` to every exception raised within this context."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}: {', '.join(names)}")
        raise


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise TrainingDataError(f"{name}={number}: a number from 1 is accepted.")


def _check_shared(missing: Sequence[str], folder: Path, ranks: Ranks) -> None:
    if ranks.any(bool(missing)):
        here = f" Missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}." if missing else ""
        raise TrainingDataError(
            f"{folder} lacks files that other processes have just written. The cache must be in a folder that all "
            f"processes of the job share.{here}"
        )


def _reason(problem: Path) -> str:
    try:
        return str(read_json(problem)["reason"])
    except (OSError, ValueError, KeyError, TypeError):  # the file is damaged
        return "it cannot be decoded"
