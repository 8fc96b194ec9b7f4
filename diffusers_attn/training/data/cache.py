"""Latents and text embeddings, computed once.

The VAE and the text encoders need not be in memory while the transformer is trained, and nothing is encoded twice:
what is computed is kept in safetensors files named by a hash of what it was computed from, that is the content of the
picture or video (or the caption) and the settings of whatever encodes. Several processes divide the work; several jobs
that share a cache fill it one after the other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import decode
from .buckets import Bucket, Buckets
from .digests import content_digests
from .disk import write_file
from .errors import Problem, TrainingDataError, check_on_bad_data, settle
from .examples import Example
from .lock import alone_in
from .prefetch import ahead
from .ranks import OneRank, Ranks, in_step
from .resize_crop import fit
from .store import TensorStore, hash_of

_FORMAT = 1
"""Changes when the same settings give other pixels; files of before are then made again."""

Encode = Callable[[Tensor], Mapping[str, Tensor]]
"""Pixels float32 [batch, 3, frames, height, width] in [-1, 1] to tensors [batch, ...], by name."""
EncodeText = Callable[[list[str]], Mapping[str, Tensor]]
"""Captions to tensors [batch, ...], by name."""


class CachedLatents(NamedTuple):
    """An example whose latents are there."""

    example: Example
    bucket: Bucket
    path: Path


class _Work(NamedTuple):
    key: str
    made_from: dict[str, Any]
    example: Example
    bucket: Bucket
    numbers: list[int]


class LatentCache:
    """What a VAE makes of examples.

    Args:
        folder: of the cache; one that all ranks see.
        settings: what decides the latents apart from pixels: model, revision, the VAE's configuration, dtype. JSON
            must be able to say it. Other settings are other files.
        buckets: the sizes to which examples are brought.
        crop: "centre", or "random": a part of each example that depends on its content and on `seed` only.
        seed: of random crops.

    Raises:
        TrainingDataError: settings that JSON cannot say.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        buckets: Buckets,
        *,
        crop: str = "centre",
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.buckets, self.crop, self.seed = buckets, crop, seed
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
        """Computes what is not there yet. All ranks must call this, with the same examples.

        Args:
            examples: what to train on.
            encode: float32 pixels [batch, 3, frames, height, width] in [-1, 1], on the CPU, to tensors [batch, ...] by
                name. A latent distribution is best kept as `latents_mean` and `latents_logvar`, so that training can
                draw from it each time.
            ranks: the processes that divide the work; None is this one by itself.
            on_bad_data: for what cannot be decoded or fits no bucket, "refuse" or "skip".
            batch_size: how many are encoded together. One by one, results do not depend on what else there is.
            decoding_threads: threads that decode while others are encoded.

        Returns:
            The examples that can be trained on, in their order, with buckets and files.

        Raises:
            TrainingDataError: bad data that is refused; or none is left; or `encode` gave what is no number, or
                tensors of another batch size; or ranks do not see the same folder.
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
        distinct = sorted({each.key: each for each in work.values()}.values(), key=lambda each: (each.bucket, each.key))
        mine = [each for each in distinct[ranks.rank :: ranks.size] if not self.store.has(each.key)]
        for each in mine:
            self._mark(each.key).unlink(missing_ok=True)
            # A damaged file must not pass for a good one, should it turn out that it cannot be made again.
            self.store.path(each.key).unlink(missing_ok=True)
        refusing = on_bad_data == "refuse" and bool(problems)

        def encode_batch(batch: list[tuple[_Work, Tensor | TrainingDataError]]) -> None:
            nonlocal refusing
            good: list[tuple[_Work, Tensor]] = []
            for item, pixels in batch:
                if isinstance(pixels, Tensor):
                    good.append((item, pixels))
                    continue
                self._note(item.key, str(pixels))
                refusing = refusing or on_bad_data == "refuse"
            if good and not refusing:  # else there will be no training, and the rest is only looked at
                self._encode(good, encode)

        def pixels_of(batch: list[_Work]) -> list[tuple[_Work, Tensor | TrainingDataError]]:
            return [(each, self._pixels(each)) for each in batch]

        decoded = ahead(pixels_of, _batches(mine, batch_size), threads=decoding_threads, depth=decoding_threads)
        with contextlib.closing(decoded):
            in_step(ranks, decoded, encode_batch, "encoding pictures and videos")
        return self._outcome(examples, work, problems, on_bad_data, ranks)

    def _work(self, examples: Sequence[Example], ranks: Ranks) -> tuple[dict[int, _Work], dict[int, str]]:
        """What is to be made of which example, and what is wrong with the others."""
        self.store.remove_unfinished()
        digests = content_digests([example.source for example in examples], self.folder / "digests", ranks)
        work: dict[int, _Work] = {}
        problems: dict[int, str] = {}
        for i, (example, digest) in enumerate(zip(examples, digests)):
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
            }
            work[i] = _Work(hash_of(made_from), made_from, example, bucket, numbers)
        return work, problems

    def _pixels(self, work: _Work) -> Tensor | TrainingDataError:
        # A seed of its own for each, that no other example moves.
        seed = self.seed ^ int(work.made_from["content"][:12], 16)
        try:
            return fit(decode.read(work.example, work.numbers), work.bucket, crop=self.crop, seed=seed)
        except TrainingDataError as error:
            return error

    def _encode(self, good: list[tuple[_Work, Tensor]], encode: Encode) -> None:
        pixels = torch.stack([pixels.transpose(0, 1) for _, pixels in good])
        names = [each.example.name for each, _ in good]
        with torch.no_grad(), _naming("encoding", names):
            rows = _rows(encode(pixels), names)
        for (each, _), tensors in zip(good, rows):
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
            path, mark = self.store.path(each.key), self._mark(each.key)
            if path.is_file():
                cached.append(CachedLatents(examples[i], each.bucket, path))
            elif mark.is_file():
                problems[i] = _reason(mark)
            else:
                missing.append(examples[i].name)
        named = [Problem(examples[i].name, reason) for i, reason in sorted(problems.items())]
        # Where bad data is refused, nothing was encoded after it was found.
        _check_shared([] if named and on_bad_data == "refuse" else missing, self.folder, ranks)
        left = len(examples) - len(named)
        settle(named, left, f"{len(examples)} examples", on_bad_data, main_process=ranks.rank == 0)
        return cached

    def _note(self, key: str, reason: str) -> None:
        write_file(self._mark(key), lambda path: path.write_text(json.dumps({"reason": reason})))

    def _mark(self, key: str) -> Path:
        """Where it is noted that something cannot be decoded: so all ranks know. It is tried again every time."""
        return self.folder / "problems" / f"{key}.json"


class TextCache:
    """What text encoders make of captions.

    Args:
        folder: of the cache; one that all ranks see.
        settings: what decides the embeddings apart from captions: model, revision, lengths, dtype. JSON must be able
            to say it.

    Raises:
        TrainingDataError: settings that JSON cannot say.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.store = TensorStore(self.folder / "text")
        hash_of(self.settings)

    def path(self, caption: str) -> Path:
        """Where the embeddings of `caption` are, or would be."""
        return self.store.path(hash_of(self._made_from(caption)))

    def fill(
        self,
        captions: Iterable[str],
        encode_text: EncodeText,
        *,
        ranks: Ranks | None = None,
        batch_size: int = 1,
    ) -> dict[str, Path]:
        """Computes what is not there yet. All ranks must call this, with the same captions.

        Args:
            captions: each is encoded once, and the empty one, which dropped captions become, always.
            encode_text: captions to tensors [batch, ...] by name.
            ranks: the processes that divide the work; None is this one by itself.
            batch_size: how many are encoded together. An encoder that pads to the longest of a batch gives embeddings
                that depend on the others, and wants 1.

        Returns:
            The file of each caption, that of "" among them.

        Raises:
            TrainingDataError: `encode_text` gave what is no number, or tensors of another batch size; or ranks do not
                see the same folder.
            OtherRankError: encoding failed on another rank.
        """
        _check_positive(batch_size=batch_size)
        ranks = ranks or OneRank()
        with alone_in(self.folder, ranks, "the cache"):
            return self._fill(captions, encode_text, ranks, batch_size)

    def _fill(self, captions: Iterable[str], encode_text: EncodeText, ranks: Ranks, batch_size: int) -> dict[str, Path]:
        self.store.remove_unfinished()
        distinct = sorted({"", *captions})
        mine = [text for text in distinct[ranks.rank :: ranks.size] if not self.store.has(self._key(text))]

        def encode(batch: list[str]) -> None:
            names = [repr(caption) for caption in batch]
            with torch.no_grad(), _naming("encoding the captions", names):
                rows = _rows(encode_text(batch), names)
            for caption, tensors in zip(batch, rows):
                self.store.write(self._key(caption), tensors, self._made_from(caption))

        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        in_step(ranks, batches, encode, "encoding captions")
        ranks.barrier()
        paths = {caption: self.path(caption) for caption in distinct}
        _check_shared([repr(caption) for caption, path in paths.items() if not path.is_file()], self.folder, ranks)
        return paths

    def _made_from(self, caption: str) -> dict[str, Any]:
        return {"format": _FORMAT, "caption": caption, "settings": self.settings}

    def _key(self, caption: str) -> str:
        return hash_of(self._made_from(caption))


def _batches(work: Sequence[_Work], batch_size: int) -> list[list[_Work]]:
    """In batches of one bucket each."""
    batches: list[list[_Work]] = []
    for each in work:
        if batches and batches[-1][0].bucket == each.bucket and len(batches[-1]) < batch_size:
            batches[-1].append(each)
        else:
            batches.append([each])
    return batches


def _rows(tensors: Mapping[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """Tensors [batch, ...] as one dict for each of `names`."""
    of = ", ".join(names)
    if not tensors:
        raise TrainingDataError(f"the encoder gave no tensors for {of}.")
    for name, tensor in tensors.items():
        if tensor.ndim < 1 or tensor.shape[0] != len(names):
            raise TrainingDataError(
                f"the encoder gave {name!r} of shape {list(tensor.shape)} for {of}; the first dimension must be "
                f"{len(names)}, one for each."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingDataError(
                f"the encoder gave {name!r} with NaN or infinity for {of}. Some VAEs and text encoders overflow in "
                "half precision; compute in float32, mixed_precision='no'."
            )
    # Copies, since a view would be written with all that it is a view of.
    return [{name: tensor[i].detach().cpu().clone() for name, tensor in tensors.items()} for i in range(len(names))]


@contextlib.contextmanager
def _naming(what: str, names: Sequence[str]) -> Iterator[None]:
    """What is raised within says what it was about, below its traceback."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}: {', '.join(names)}")
        raise


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise TrainingDataError(f"{name}={number}; it is 1 or more.")


def _check_shared(missing: Sequence[str], folder: Path, ranks: Ranks) -> None:
    if ranks.any(bool(missing)):
        here = f" Not there: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}." if missing else ""
        raise TrainingDataError(
            f"{folder} lacks what other processes have just written. The cache must be in a folder that all processes "
            f"of the job see.{here}"
        )


def _reason(mark: Path) -> str:
    try:
        return str(json.loads(mark.read_text())["reason"])
    except (ValueError, KeyError, TypeError):  # a damaged note
        return "it cannot be decoded"
