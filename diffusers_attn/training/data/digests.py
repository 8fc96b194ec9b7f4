"""Digests of all files' contents. One process reads each file, and reads it again only after it has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...json_files import read_json
from .disk import write_file
from .errors import TrainingDataError
from .ranks import Ranks, in_step
from .source import Source, content_digest

_FILES_PER_STEP = 16
_DIGEST = re.compile("[0-9a-f]{64}")


def content_digests(sources: Sequence[Source], folder: Path, ranks: Ranks) -> list[str]:
    """The digests of `sources`, in their order. All ranks must call this with the same sources.

    Args:
        sources: images or videos.
        folder: folder that stores digests by the stamp of their file. All ranks must be able to access it.
        ranks: the processes that divide the reading.

    Raises:
        TrainingDataError: the ranks do not share the folder, or a file has changed during the call.
        OtherRankError: reading failed on another rank.
    """
    stamps = [source.stamp() for source in sources]
    known = _known(folder)
    ranks.barrier()  # no rank writes until all have read, so that all divide the same list
    unknown = sorted({stamp: i for i, stamp in enumerate(stamps) if stamp not in known}.items())
    mine = unknown[ranks.rank :: ranks.size]

    def read(part: list[tuple[str, int]]) -> None:
        found = {stamp: content_digest(sources[i]) for stamp, i in part}
        text = json.dumps(found, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        write_file(folder / f"{name}.json", lambda path: path.write_text(text))

    parts = [mine[i : i + _FILES_PER_STEP] for i in range(0, len(mine), _FILES_PER_STEP)]
    in_step(ranks, parts, read, "reading the training data")
    if unknown:
        known = _known(folder)
    missing = [sources[i] for i, stamp in enumerate(stamps) if stamp not in known]
    if ranks.any(bool(missing)):
        raise TrainingDataError(
            f"{folder} lacks files that other processes have just written there, or the data have changed. Put data "
            "and cache into folders that all processes share, and do not change the data during the run."
        )
    return [known[stamp] for stamp in stamps]


def _known(folder: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            digests = read_json(path)
        except (OSError, ValueError):  # another program's file, or damaged; its digests are computed again
            continue
        if isinstance(digests, dict):
            known |= {stamp: each for stamp, each in digests.items() if _DIGEST.fullmatch(str(each))}
    return known
