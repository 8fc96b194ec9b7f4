"""A cache of captions' embeddings.

As that of latents: files are named by a hash of the caption, of its example's reference images if the text encoder sees
them, and of the encoder's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .encoding import FORMAT, check_positive, check_shared, naming, rows_of
from .errors import TrainingDataError
from .latent_cache import CachedLatents
from .lock import alone_in
from .ranks import OneRank, Ranks, in_step
from .store import TensorStore, hash_of

EncodeText = Callable[..., Mapping[str, Tensor]]
"""Encodes a list of captions to tensors [batch, ...] by name. The reference images of captions that have any are the
second argument, as in `Encode`."""
CaptionT = TypeVar("CaptionT", bound="str | PicturedCaption")


class PicturedCaption(NamedTuple):
    """A caption whose embeddings depend on its example's reference images."""

    caption: str
    pictures: str
    """Key of the example's latents, which covers the images and what is done to them."""


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
            TrainingDataError: captions with pictures and another `batch_size` than 1; `encode_text` returned NaN,
                infinity or another batch size; or the ranks do not share the folder.
            OtherRankError: encoding failed on another rank.
        """
        check_positive(batch_size=batch_size)
        if references is not None and batch_size != 1:
            raise TrainingDataError(f"batch_size={batch_size}: captions with pictures need batch_size=1.")
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
        empty = {""} if references is None else {PicturedCaption("", each.pictures) for each in distinct}
        distinct = sorted(distinct | empty)
        mine = [text for text in distinct[ranks.rank :: ranks.size] if not self.store.has(self._key(text))]

        def encode(batch: list[Any]) -> None:
            texts = batch if references is None else [each.caption for each in batch]
            names = [repr(text) for text in texts]
            with torch.no_grad(), naming("encoding the captions", names):
                pictures = () if references is None else (references(batch[0].pictures),)
                rows = rows_of(encode_text(texts, *pictures), names)
            for caption, tensors in zip(batch, rows):
                self.store.write(self._key(caption), tensors, self._made_from(caption))

        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        in_step(ranks, batches, encode, "encoding captions")
        ranks.barrier()
        paths = {caption: self.path(caption) for caption in distinct}
        check_shared([repr(caption) for caption, path in paths.items() if not path.is_file()], self.folder, ranks)
        return paths

    def _made_from(self, caption: str | PicturedCaption) -> dict[str, Any]:
        of = caption._asdict() if isinstance(caption, PicturedCaption) else {"caption": caption}
        return {"format": FORMAT, **of, "settings": self.settings}

    def _key(self, caption: str | PicturedCaption) -> str:
        return hash_of(self._made_from(caption))


def text_key(latents: CachedLatents, caption: str, pictured: bool) -> Any:
    """The key of an example's caption in what `TextCache.fill` returns: a `PicturedCaption` if `pictured`."""
    return PicturedCaption(caption, latents.path.stem) if pictured else caption
