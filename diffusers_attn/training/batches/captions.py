"""Encodes the captions of a run, with the reference images of examples if the text encoder sees these, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.latent_cache import CachedLatents, LatentCache
from ..data.ranks import Ranks
from ..data.text_cache import TextCache, text_key
from ..families import Family


def encode_captions(
    text: TextCache, family: Family, latents: Sequence[tuple[LatentCache, list[CachedLatents]]], ranks: Ranks
) -> dict[Any, Path]:
    """Encodes the captions of examples whose latents are cached. All ranks must call this.

    Args:
        text: the cache of the results.
        family: the family with its pipeline, whose text encoders are on their device.
        latents: caches of latents, each with its examples.
        ranks: the processes that divide the work.

    Returns:
        What `TextCache.fill` returns.
    """
    pictured = family.text_has_pictures
    captions = [
        text_key(each, caption, pictured) for _, those in latents for each in those for caption in each.example.captions
    ]
    if not pictured:
        return text.fill(captions, family.encode_text, ranks=ranks)
    cache_of = {each.path.stem: cache for cache, those in latents for each in those}

    def encode(captions: list[str], references: Tensor) -> dict[str, Tensor]:
        return family.seeing(references).encode_text(captions)

    return text.fill(captions, encode, ranks=ranks, references=lambda key: cache_of[key].references_of(key))
