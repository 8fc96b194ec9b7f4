"""What there is to train on: pictures or videos with captions, from a folder or a Hugging Face dataset.

All of it is looked at before the first step, and what cannot be used is reported by name; a broken file found in the
middle of a training costs hours, and one that is left out silently is never found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import decode
from .captions import CAPTION_COLUMNS, captions_of_folder
from .errors import Problem, TrainingDataError, check_on_bad_data, settle
from .source import FileSource, RowSource, Source
from .walk import files_of

_PROBING_THREADS = 8


@dataclass(frozen=True)
class Example:
    """One picture or video with its caption."""

    name: str
    """the path within the folder, or the row: what messages call it."""
    caption: str
    kind: Literal["image", "video"]
    width: int
    """as it is seen, after the rotation that a camera noted."""
    height: int
    frames: int
    """1 for a picture."""
    fps: float | None
    """of a video whose header says it; on average, where it varies."""
    source: Source
    times: tuple[float, ...] | None = None
    """of a video whose rate varies: when each frame is shown, in seconds from the first."""


class _Candidate(NamedTuple):
    name: str
    caption: str
    kind: Literal["image", "video"]
    source: Source


def read_examples(
    data: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    split: str = "train",
    main_process: bool = True,
    excluded: Sequence[str | Path] = (),
) -> list[Example]:
    """The examples of a folder of media, of a dataset saved by `datasets`, or of one by its name.

    Args:
        data: a folder of pictures or videos, with `metadata.jsonl`, `.csv` or `.parquet` (columns `file_name`
            and `caption`, `text` or `prompt`) or a `.txt` file beside each; or a folder that `Dataset.save_to_disk`
            wrote or that has Parquet or Arrow files; or, where there is no such path, the name of a Hugging Face
            dataset.
        on_bad_data: "refuse" raises for the first data set with anything wrong in it, and names all that is wrong;
            "skip" leaves that out and names it in one warning.
        caption_column: the column with captions, where it has another name or several could be meant.
        split: of a Hugging Face dataset.
        main_process: whether this process logs the warning.
        excluded: folders that are no data though they may be within `data`: where a run writes to.

    Returns:
        The examples, in an order that is the same on every machine.

    Raises:
        TrainingDataError: bad data that is refused; or no data; or `data` is one of `excluded`.
        MissingDecoderError: a package that reads this kind of data is missing.
    """
    check_on_bad_data(on_bad_data)
    path = Path(data).expanduser()
    if path.is_dir():
        saved, tables = _saved_by_datasets(path, excluded)
        if not (saved or tables):
            return read_folder(
                path,
                on_bad_data=on_bad_data,
                caption_column=caption_column,
                main_process=main_process,
                excluded=excluded,
            )
        within = [each for each in excluded if Path(each).resolve().is_relative_to(path.resolve())]
        if within:
            raise TrainingDataError(f"{data} is a dataset, and {within[0]} is within it. Write to another folder.")
        dataset = _load(str(path), split, saved=saved)
    elif path.exists():
        raise TrainingDataError(f"{data} is a file; what is needed is the folder with the pictures or videos.")
    elif os.path.isabs(path) or str(data).startswith((".", "~")) or str(data).count("/") > 1:
        raise TrainingDataError(f"there is no folder {data}.")
    else:
        dataset = _load(str(data), split, saved=False)
    return read_dataset(
        dataset, name=str(data), on_bad_data=on_bad_data, caption_column=caption_column, main_process=main_process
    )


def read_folder(
    folder: str | Path,
    *,
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    main_process: bool = True,
    excluded: Sequence[str | Path] = (),
) -> list[Example]:
    """The examples of a folder of pictures or videos, its folders included. Arguments and errors: `read_examples`."""
    check_on_bad_data(on_bad_data)
    root = Path(folder).absolute()
    if not root.is_dir():
        raise TrainingDataError(f"there is no folder {folder}.")
    if any(Path(each).resolve() == root.resolve() for each in excluded):
        raise TrainingDataError(f"{folder} has the data, and a run would write into it. Write to another folder.")
    captioned, problems = captions_of_folder(root, caption_column, map(Path, excluded))
    candidates = [
        _Candidate(
            name,
            caption,
            "video" if Path(name).suffix.lower() in decode.VIDEO_SUFFIXES else "image",
            FileSource(root / name),
        )
        for name, caption in sorted(captioned.items())
    ]
    return _probed(candidates, problems, str(folder), on_bad_data, main_process)


def read_dataset(
    dataset: Any,
    *,
    name: str = "dataset",
    on_bad_data: str = "refuse",
    caption_column: str | None = None,
    main_process: bool = True,
) -> list[Example]:
    """The examples of a `datasets.Dataset` with a column of `Image` or `Video` and one of captions.

    Args:
        dataset: the dataset; it stays as it is.
        name: what messages call it.

    The other arguments and the errors are those of `read_examples`.
    """
    check_on_bad_data(on_bad_data)
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TrainingDataError(
            f"{name} is a {type(dataset).__name__}; what is needed is a datasets.Dataset: one split, not streamed."
        )
    kinds: dict[str, tuple[Literal["image", "video"], Any]] = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            kinds[column] = ("image", datasets.Image(decode=False))
        elif isinstance(feature, datasets.Video):
            kinds[column] = ("video", datasets.Video(decode=False))
    if len(kinds) != 1:
        raise TrainingDataError(
            f"{name} has {len(kinds)} columns of pictures or videos ({', '.join(kinds) or 'none'}) and must have one; "
            f"its columns are {', '.join(dataset.column_names)}. Change that with its `remove_columns` or "
            "`cast_column`, save it with `save_to_disk`, and give that folder."
        )
    captions = _caption_column(dataset.column_names, name, caption_column)
    column, (kind, undecoded) = next(iter(kinds.items()))
    rows = dataset.select_columns([column]).cast_column(column, undecoded).with_format("arrow")
    candidates, problems = [], []
    for index, caption in enumerate(dataset[captions]):
        row = f"row {index}"
        if not isinstance(caption, str) or not caption.strip():
            problems.append(Problem(row, f"no caption in column {captions!r}"))
        else:
            candidates.append(_Candidate(row, caption.strip(), kind, RowSource(rows, index, column)))
    return _probed(candidates, problems, name, on_bad_data, main_process)


def _probed(
    candidates: Sequence[_Candidate], problems: list[Problem], where: str, on_bad_data: str, main_process: bool
) -> list[Example]:
    def probe(candidate: _Candidate) -> Example | Problem:
        name, caption, kind, source = candidate
        try:
            if kind == "video" and name.lower().endswith(".gif") and decode.probe_image(source).frames == 1:
                kind = "image"
            width, height, frames, fps, times = (decode.probe_video if kind == "video" else decode.probe_image)(source)
        except TrainingDataError as error:
            return Problem(name, str(error))
        return Example(name, caption, kind, width, height, frames, fps, source, times)

    with ThreadPoolExecutor(_PROBING_THREADS) as pool:
        found = list(pool.map(probe, candidates))
    examples = [each for each in found if isinstance(each, Example)]
    problems = problems + [each for each in found if isinstance(each, Problem)]
    settle(problems, len(examples), where, on_bad_data, main_process)
    return examples


def _caption_column(columns: Sequence[str], name: str, asked: str | None) -> str:
    there = [column for column in ((asked,) if asked else CAPTION_COLUMNS) if column in columns]
    if len(there) == 1:
        return there[0]
    raise TrainingDataError(
        f"{name} has the columns {', '.join(columns)}; captions are looked for in "
        f"{f'caption_column={asked!r}' if asked else ', '.join(CAPTION_COLUMNS)}, and {len(there) or 'none'} of them "
        f"{'are' if there else 'is'} there. Say which with caption_column=..."
    )


def _saved_by_datasets(path: Path, excluded: Sequence[str | Path]) -> tuple[bool, bool]:
    """Whether `Dataset.save_to_disk` wrote it, and whether it has tables and nothing else that is data."""
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    suffixes = {file.suffix.lower() for file in files_of(path, map(Path, excluded))[0]}
    media = suffixes & (decode.IMAGE_SUFFIXES | decode.VIDEO_SUFFIXES)
    return saved, not media and bool(suffixes & {".parquet", ".arrow"})


def _load(name: str, split: str, *, saved: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TrainingDataError(
            f"{name} is no folder of pictures or videos; reading it as a Hugging Face dataset needs `pip install "
            "datasets`."
        ) from error
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:
        raise TrainingDataError(
            f"{name} is no folder here, and as a Hugging Face dataset (split {split!r}) it cannot be loaded: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TrainingDataError(
                f"{name} has no split {split!r}; it has {', '.join(map(repr, loaded))}. Save the "
                "one that you want with `save_to_disk`, and give that folder."
            )
        loaded = loaded[split]
    return loaded
