"""Digests of the contents of all files, each file read by one process and, while it does not change, only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from .disk import write_file
from .errors import TrainingDataError
from .ranks import Ranks, in_step
from .source import Source, content_digest

_FILES_PER_STEP = 16


def content_digests(sources: Sequence[Source], folder: Path, ranks: Ranks) -> list[str]:
    """The digests of `sources`, in their order; all ranks must call this with the same.

    Args:
        sources: pictures or videos.
        folder: where digests are kept, by the stamps of their files; one that all ranks see.
        ranks: divide the reading.

    Raises:
        TrainingDataError: the folder is not the same one for all ranks, or a file changes meanwhile.
        OtherRankError: reading failed on another rank.
    """
    stamps = [source.stamp() for source in sources]
    known = _known(folder)
    ranks.barrier()  # before anyone writes: all know the same, and so divide the same
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
            f"{folder} lacks what other processes have just written there, or files of the data have changed. The data "
            "and the cache must be in folders that all processes of the job see and leave alone."
        )
    return [known[stamp] for stamp in stamps]


def _known(folder: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            said = json.loads(path.read_text())
        except ValueError:  # someone else's, or damaged: what it said is found out again
            continue
        if isinstance(said, dict):
            known.update(said)
    return known
