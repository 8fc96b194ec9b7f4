"""Training examples: images or videos with captions, from a folder or a Hugging Face dataset.

Every file is opened before the first step, and every unusable one is reported by name. A broken file that is found
during training costs hours, and one that is skipped silently is never found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import decode
from .captions import CAPTION_COLUMNS, captions_of_folder, texts_of
from .errors import Problem, TrainingDataError, check_on_bad_data, report_problems
from .masks import Mask, check_masks, check_size, is_mask, masks_in
from .source import FileSource, RowSource, Source
from .walk import files_of

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
    references: tuple[Source, ...] = ()
    """Reference images."""
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
    mask: Mask | None = None


def read_examples(
    data: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    caption_lines: bool = False,
    loss_mask: str = "none",
    split: str = "train",
    main_process: bool = True,
    excluded: Sequence[str | Path] = (),
) -> list[Example]:
    """Reads the examples of a folder of media files, or of a Hugging Face dataset.

    Args:
        data: a folder of images or videos with captions in `metadata.jsonl`, `.csv` or `.parquet` (columns `file_name`
            and `caption`, `text` or `prompt`, a text or a list of texts) or in a `.txt` file per media file; or a
            folder that `Dataset.save_to_disk` wrote or that has Parquet or Arrow files; or, if no such path exists, the
            name of a Hugging Face dataset.
        on_bad_data: "refuse" raises an error that names all problems; "skip" leaves these examples out and logs one
            warning.
        caption_column: column with the captions. None: the one of `caption`, `text` and `prompt` that exists.
        caption_lines: whether each line of a `.txt` file is a caption of its own.
        loss_mask: "files" reads masks of the loss from files: that of `a.png` or `a.mp4` is `a_mask.png`, white where
            the loss counts, and examples without one count entirely. "alpha" uses the transparency of images. "none"
            uses no masks.
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
        "main_process": main_process,
    }  # fmt: skip
    path = Path(data).expanduser()
    if path.is_dir():
        saved, tables = _saved_by_datasets(path, excluded)
        if not (saved or tables):
            return read_folder(path, caption_lines=caption_lines, excluded=excluded, **reading)
        within = [each for each in excluded if Path(each).resolve().is_relative_to(path.resolve())]
        if within:
            raise TrainingDataError(f"{within[0]} lies within the dataset {data}. Give an output folder outside of it.")
        dataset = _load(str(path), split, saved=saved)
    elif path.exists():
        raise TrainingDataError(f"{data} is a file. Give the folder with the images or videos.")
    elif os.path.isabs(path) or str(data).startswith((".", "~")) or str(data).count("/") > 1:
        raise TrainingDataError(f"there is no folder {data}.")
    else:
        dataset = _load(str(data), split, saved=False)
    return read_dataset(dataset, name=str(data), **reading)


def read_folder(
    folder: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    caption_lines: bool = False,
    loss_mask: str = "none",
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
    left_out = is_mask if loss_mask == "files" else None
    folders = [Path(each) for each in excluded]
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
        candidates.append(_Candidate(name, captions, "video" if is_video else "image", source, mask))
    return _probed(candidates, problems, str(folder), on_bad_data, main_process)


def read_dataset(
    dataset: Any,
    *,
    name: str = "dataset",
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    loss_mask: str = "none",
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
    if loss_mask == "files":
        raise TrainingDataError(
            f"loss_mask='files': {name} is a dataset, whose rows have no files with masks. Give loss_mask='alpha' for "
            "transparent images, or save the images as files."
        )
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TrainingDataError(
            f"{name} is a {type(dataset).__name__}; accepted is a datasets.Dataset, one split and not streamed."
        )
    kinds: dict[str, tuple[Literal["image", "video"], Any]] = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            kinds[column] = ("image", datasets.Image(decode=False))
        elif isinstance(feature, datasets.Video):
            kinds[column] = ("video", datasets.Video(decode=False))
    if len(kinds) != 1:
        raise TrainingDataError(
            f"{name} must have one column of images or videos, but has {len(kinds)} ({', '.join(kinds) or 'none'}). "
            f"Its columns are {', '.join(dataset.column_names)}. Change them with `Dataset.remove_columns` or "
            "`Dataset.cast_column`, save the result with `save_to_disk`, and give that folder."
        )
    caption_name = _caption_column(dataset.column_names, name, caption_column)
    column, (kind, undecoded) = next(iter(kinds.items()))
    rows = dataset.select_columns([column]).cast_column(column, undecoded).with_format("arrow")
    candidates, problems = [], []
    for index, value in enumerate(dataset[caption_name]):
        row = f"row {index}"
        captions = texts_of(value)
        if captions:
            source = RowSource(rows, index, column)
            mask = Mask(source, "alpha") if loss_mask == "alpha" and kind == "image" else None
            candidates.append(_Candidate(row, captions, kind, source, mask))
        else:
            problems.append(Problem(row, f"no caption in column {caption_name!r}"))
    return _probed(candidates, problems, name, on_bad_data, main_process)


def _probed(
    candidates: Sequence[_Candidate], problems: list[Problem], where: str, on_bad_data: str, main_process: bool
) -> list[Example]:
    def probe(candidate: _Candidate) -> Example | Problem:
        name, captions, kind, source, mask = candidate
        try:
            if kind == "video" and name.lower().endswith(".gif") and decode.probe_image(source).frames == 1:
                kind = "image"
            width, height, frames, fps, times = (decode.probe_video if kind == "video" else decode.probe_image)(source)
            if mask is not None and mask.source is not source:
                check_size(mask, width, height)
        except TrainingDataError as error:
            return Problem(name, str(error))
        more = tuple(captions[1:])
        return Example(
            name, captions[0], kind, width, height, frames, fps, source, times, more_captions=more, mask=mask
        )

    with ThreadPoolExecutor(_PROBING_THREADS) as pool:
        found = list(pool.map(probe, candidates))
    examples = [each for each in found if isinstance(each, Example)]
    problems = problems + [each for each in found if isinstance(each, Problem)]
    report_problems(problems, len(examples), where, on_bad_data, main_process)
    return examples


def _caption_column(columns: Sequence[str], name: str, asked: str | None) -> str:
    found = [column for column in ((asked,) if asked else CAPTION_COLUMNS) if column in columns]
    if len(found) == 1:
        return found[0]
    expected = f"a column {asked!r}" if asked else f"exactly one of the columns {', '.join(CAPTION_COLUMNS)}"
    raise TrainingDataError(
        f"{name} has the columns {', '.join(columns)}; {expected} is expected for captions. Name the column with "
        "caption_column=..."
    )


def _saved_by_datasets(path: Path, excluded: Sequence[str | Path]) -> tuple[bool, bool]:
    """Whether `Dataset.save_to_disk` wrote a folder, and whether it has Parquet or Arrow files but no media files."""
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    suffixes = {file.suffix.lower() for file in files_of(path, map(Path, excluded))[0]}
    media = suffixes & (decode.IMAGE_SUFFIXES | decode.VIDEO_SUFFIXES)
    return saved, not media and bool(suffixes & {".parquet", ".arrow"})


def _load(name: str, split: str, *, saved: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TrainingDataError(
            f"{name} is not a folder of images or videos; reading it as a Hugging Face dataset needs `pip install "
            "datasets`."
        ) from error
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:
        raise TrainingDataError(
            f"{name} is not a folder, and cannot be loaded as a Hugging Face dataset (split {split!r}): {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TrainingDataError(
                f"{name} has no split {split!r}; it has {', '.join(map(repr, loaded))}. Save one of them with "
                "`save_to_disk`, and give that folder."
            )
        loaded = loaded[split]
    return loaded
