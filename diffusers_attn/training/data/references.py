"""Reference images: pictures that an example is made from, such as the original of an edited picture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from . import decode
from .errors import Problem, TrainingDataError, report_problems
from .examples import Example
from .source import FileSource
from .walk import files_of


def with_references(
    examples: Sequence[Example],
    folder: str | Path,
    *,
    most: int = 1,
    on_bad_data: str = "refuse",
    main_process: bool = True,
) -> list[Example]:
    """Finds the reference images of examples of a folder.

    The reference of `people/a.png` is `people/a.*` in the folder of references. An example with several has `a_1.*`,
    `a_2.*` and so on instead. All examples have equally many.

    Args:
        examples: the examples, which must be files.
        folder: the folder of references.
        most: largest number of references that the model accepts.
        on_bad_data: "refuse" raises an error that names all problems; "skip" leaves these examples out.
        main_process: whether this process logs the warning about examples that are left out.

    Returns:
        The examples with their `references`.

    Raises:
        TrainingDataError: there is no such folder, the examples are rows of a dataset, there are problems and
            `on_bad_data` is "refuse", or no example is usable.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise TrainingDataError(f"there is no folder {folder} with reference images.")
    if not all(isinstance(each.source, FileSource) for each in examples):
        raise TrainingDataError(
            "reference images belong to the files of a folder, but the data are rows of a dataset. Save the images as "
            "files, each with its caption in a .txt file of the same name."
        )
    files: dict[str, Path] = {}
    for file in files_of(root)[0]:
        if file.suffix.lower() in decode.IMAGE_SUFFIXES:
            files[_stem(file.relative_to(root).as_posix())] = file
    found, problems = [], []
    number = None
    for example in examples:
        try:
            references = _references(example, files)
            number = number or len(references)
            _check_number(len(references), number, most)
        except TrainingDataError as error:
            problems.append(Problem(example.name, str(error)))
            continue
        found.append(dataclasses.replace(example, references=tuple(FileSource(each) for each in references)))
    report_problems(problems, len(found), str(folder), on_bad_data, main_process)
    return found


def _references(example: Example, files: Mapping[str, Path]) -> list[Path]:
    stem = _stem(example.name)
    if stem in files:
        found = [files[stem]]
    else:
        numbered = (f"{stem}_{number}" for number in itertools.count(1))
        found = [files[name] for name in itertools.takewhile(files.__contains__, numbered)]
    if not found:
        raise TrainingDataError(f"no reference image {stem}.* or {stem}_1.*")
    for each in found:
        decode.probe_image(FileSource(each))
    return found


def _check_number(number: int, first: int, most: int) -> None:
    if number > most:
        raise TrainingDataError(f"{number} reference images, but the model accepts {most}")
    if number != first:
        raise TrainingDataError(f"{number} reference images, but the first example has {first}")


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
