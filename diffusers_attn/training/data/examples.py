"""Training examples: images or videos with captions, from a folder or a Hugging Face dataset.

Every file is opened before the first step, and every unusable one is reported by name. A broken file that is found
during training costs hours, and one that is skipped silently is never found.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import decode
from .captions import captions_of_folder, texts_of
from .conditions import Given, conditions_of_folder, only_conditions
from .errors import Problem, TrainingDataError, check_on_bad_data, report_problems
from .masks import Mask, check_masks, check_size, is_mask, masks_in
from .rows import columns_of, load_rows, saved_by_datasets
from .source import FileSource, RowSource, Source

_PROBING_THREADS = 8


@dataclass(frozen=True)
class Example:
    """An image or video with its caption."""

    name: str
    """Path within the folder, or the row of the dataset."""
    caption: str
    kind: Literal["image", "video"]
    width: int
    """Width in pixels, after the rotation in the file's metadata."""
    height: int
    """Height in pixels, after the rotation."""
    frames: int
    """Number of frames; 1 for an image."""
    fps: float | None
    """Average frame rate of a video; None if unknown."""
    source: Source
    times: tuple[float, ...] | None = None
    """Time of each frame in seconds from the first, for a video with a variable frame rate."""
    conditions: Mapping[str, tuple[Given, ...]] = field(default_factory=dict)
    """Pictures and videos that it is made from, by their kind, one of `CONDITIONS`."""
    more_captions: tuple[str, ...] = ()
    """Further captions. One of all is drawn each time that the example is used."""

    place: float = 0.5
    """Part of a video: 0 is its beginning, 0.5 its middle, 1 its end; see `FramePicking.numbers`."""
    mask: Mask | None = None
    """Mask of the loss. None: the entire example counts."""
    weight: float = 1.0
    """Factor of the example's loss."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions."""
        return (self.caption, *self.more_captions)


class _Candidate(NamedTuple):
    name: str
    captions: list[str]
    kind: Literal["image", "video"]
    source: Source
    mask: Mask | None
    conditions: Mapping[str, tuple[Given, ...]]


def read_examples(
    data: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    caption_lines: bool = False,
    loss_mask: str = "none",
    conditions: Sequence[str] = (),
    split: str = "train",
    main_process: bool = True,
    excluded: Sequence[str | Path] = (),
) -> list[Example]:
    """Reads the examples of a folder of media files, or of a Hugging Face dataset.

    Args:
        data: a folder of images or videos with captions in `metadata.jsonl`, `.csv` or `.parquet` (columns `file_name`
            and `caption`, `text` or `prompt`, a text or a list of texts) or in a `.txt` file per media file; or a
            folder that `Dataset.save_to_disk` wrote or that has Parquet, Arrow or WebDataset (.tar) files; or, if no
            such path exists, the name of a Hugging Face dataset.
        on_bad_data: "refuse" raises an error that names all problems; "skip" leaves these examples out and logs one
            warning.
        caption_column: column with the captions. None: the one of `caption`, `text` and `prompt` that exists; of a
            dataset see `rows.columns_of`.
        caption_lines: whether each line of a `.txt` file is a caption of its own.
        loss_mask: "files" reads masks of the loss from files: that of `a.png` or `a.mp4` is `a_mask.png`, white where
            the loss counts, and examples without one count entirely. A dataset has them in a column `mask`. "alpha"
            uses the transparency of images. "none" uses no masks.
        conditions: kinds of conditions, of `CONDITIONS`, that are read from columns of metadata files or of a dataset.
        split: split of a Hugging Face dataset.
        main_process: whether this process logs the warning.
        excluded: folders, possibly within `data`, that are not read because the run writes to them.

    Returns:
        The examples, in the same order on every machine.

    Raises:
        TrainingDataError: there are problems and `on_bad_data` is "refuse", there are no examples, or `data` is one of
            `excluded`.
        MissingDecoderError: the package that reads this kind of data is not installed.
    """
    check_on_bad_data(on_bad_data)
    reading: dict[str, Any] = {
        "on_bad_data": on_bad_data, "caption_column": caption_column, "loss_mask": loss_mask,
        "conditions": conditions, "main_process": main_process,
    }  # fmt: skip
    path = Path(data).expanduser()
    if path.is_dir():
        saved, tables = saved_by_datasets(path, excluded)
        if not (saved or tables):
            return read_folder(path, caption_lines=caption_lines, excluded=excluded, **reading)
        within = [each for each in excluded if Path(each).resolve().is_relative_to(path.resolve())]
        if within:
            raise TrainingDataError(f"{within[0]} lies within the dataset {data}. Give an output folder outside of it.")
        dataset = load_rows(str(path), split, saved=saved)
    elif path.exists():
        raise TrainingDataError(f"{data} is a file. Give the folder with the images or videos.")
    elif os.path.isabs(path) or str(data).startswith((".", "~")) or str(data).count("/") > 1:
        raise TrainingDataError(f"there is no folder {data}.")
    else:
        dataset = load_rows(str(data), split, saved=False)
    return read_dataset(dataset, name=str(data), **reading)


def read_folder(
    folder: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    caption_lines: bool = False,
    loss_mask: str = "none",
    conditions: Sequence[str] = (),
    main_process: bool = True,
    excluded: Sequence[str | Path] = (),
) -> list[Example]:
    """Reads the examples of a folder of images or videos and its subfolders. For arguments see `read_examples`."""
    check_on_bad_data(on_bad_data)
    check_masks(loss_mask)
    root = Path(folder).absolute()
    if not root.is_dir():
        raise TrainingDataError(f"there is no folder {folder}.")
    if any(Path(each).resolve() == root.resolve() for each in excluded):
        raise TrainingDataError(f"{folder} holds the data, and the run would write to it. Give another output folder.")
    folders = [Path(each) for each in excluded]
    named = conditions_of_folder(root, conditions, folders)
    conditions_alone = only_conditions(root, named)

    def left_out(name: str) -> bool:
        return name in conditions_alone or (loss_mask == "files" and is_mask(name))

    captioned, problems = captions_of_folder(root, caption_column, folders, caption_lines, left_out)
    masks: dict[str, Mask] = {}
    if loss_mask == "files":
        masks, of_none = masks_in(root, captioned, folders)
        problems = problems + of_none
    candidates = []
    for name, captions in sorted(captioned.items()):
        source = FileSource(root / name)
        is_video = Path(name).suffix.lower() in decode.VIDEO_SUFFIXES
        mask = Mask(source, "alpha") if loss_mask == "alpha" and not is_video else masks.get(name)
        kind: Literal["image", "video"] = "video" if is_video else "image"
        candidates.append(_Candidate(name, captions, kind, source, mask, named.get(name, {})))
    return _probed(candidates, problems, str(folder), on_bad_data, main_process)


def read_dataset(
    dataset: Any,
    *,
    name: str = "dataset",
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    loss_mask: str = "none",
    conditions: Sequence[str] = (),
    main_process: bool = True,
) -> list[Example]:
    """Reads the examples of a `datasets.Dataset` with one column of `Image` or `Video` and one of captions.

    Args:
        dataset: the dataset, which is not changed.
        name: name of the dataset for messages.

    The other arguments and the errors are those of `read_examples`.
    """
    check_on_bad_data(on_bad_data)
    check_masks(loss_mask)
    columns = columns_of(dataset, name, caption_column, loss_mask == "files", conditions)
    candidates, problems = [], []
    for index, (row, value) in enumerate(zip(columns.names, columns.captions)):
        captions = texts_of(value)
        if not captions:
            problems.append(Problem(row, f"no caption in column {columns.caption!r}"))
            continue
        source = RowSource(columns.rows, index, columns.media)
        mask = Mask(source, "alpha") if loss_mask == "alpha" and columns.kind == "image" else None
        if columns.mask is not None and columns.has(columns.mask, index):
            mask = Mask(RowSource(columns.rows, index, columns.mask), "luminance")
        candidates.append(_Candidate(row, captions, columns.kind, source, mask, columns.conditions_of(index)))
    return _probed(candidates, problems, name, on_bad_data, main_process)


def _probed(
    candidates: Sequence[_Candidate], problems: list[Problem], where: str, on_bad_data: str, main_process: bool
) -> list[Example]:
    def probe(candidate: _Candidate) -> Example | Problem:
        name, captions, kind, source, mask, conditions = candidate
        try:
            if kind == "video" and name.lower().endswith(".gif") and decode.probe_image(source).frames == 1:
                kind = "image"
            width, height, frames, fps, times = (decode.probe_video if kind == "video" else decode.probe_image)(source)
            if mask is not None and mask.source is not source:
                check_size(mask, width, height)
        except TrainingDataError as error:
            return Problem(name, str(error))
        found = Example(name, captions[0], kind, width, height, frames, fps, source, times, conditions, mask=mask)
        return dataclasses.replace(found, more_captions=tuple(captions[1:]))

    with ThreadPoolExecutor(_PROBING_THREADS) as pool:
        found = list(pool.map(probe, candidates))
    examples = [each for each in found if isinstance(each, Example)]
    problems = problems + [each for each in found if isinstance(each, Problem)]
    report_problems(problems, len(examples), where, on_bad_data, main_process)
    return examples
