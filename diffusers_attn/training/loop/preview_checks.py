"""Checks of the samples of a run against its model, before hours of encoding and training."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ..data.buckets import check_frames
from ..data.conditions import given_file, probe
from ..data.errors import TrainingDataError
from ..errors import TrainingError
from ..families import Family
from ..settings.config import TrainConfig
from ..settings.flag_names import option
from ..settings.previews import Preview


def check_previews(config: TrainConfig, family: Family) -> None:
    """Checks the samples by the family's rules, and their sizes with the pipeline's own `check_inputs`.

    Raises:
        TrainingError: a size, a number of frames, an image or a negative prompt is not accepted by the model.
    """
    if config.validation_lossless and family.kind == "image":
        raise TrainingError(
            f"--validation_lossless: {type(family.pipeline).__name__} generates images, which are written as PNG files "
            "without loss. Leave it out."
        )
    if config.validation_frames is not None:
        check_number_of_frames("validation_frames", config.validation_frames, family)
    if config.validation_size is not None:
        _check_multiples(option("validation_size", config.validation_size), config.validation_size, family)
    _check_inputs(config, family, config.validation_size)
    for preview in config.previews:
        where = f"--validation_prompts, {preview.prompt!r}"
        try:
            _check_preview(config, family, preview)
        except TrainingError as error:
            raise TrainingError(f"{where}: {error}") from error


def _check_preview(config: TrainConfig, family: Family, preview: Preview) -> None:
    name = type(family.pipeline).__name__
    if preview.frames is not None:
        check_number_of_frames("frames", preview.frames, family)
    if preview.size is not None:
        _check_multiples(f"size {preview.size}", preview.size, family)
        _check_inputs(config, family, preview.size)
    if preview.negative_prompt is not None:
        scale = guidance_of(config, family, preview)
        if not family.negative_prompts or scale <= 1:
            why = "has no negative prompt" if not family.negative_prompts else f"uses none with a guidance of {scale:g}"
            raise TrainingError(f"negative_prompt {preview.negative_prompt!r}: {name} {why}. Leave it out.")
    _check_images(preview, family)
    for kind in ("control", "control_mask"):
        path = getattr(preview, kind)
        if path is None:
            continue
        if kind not in family.control_arguments:
            instead = " (the control of a sample is its `image`)" if kind in family.example_conditions else ""
            raise TrainingError(f"{kind} {path}: {name} takes none here{instead}. Leave it out.")
        try:
            probe(given_file(Path(path)))
        except (OSError, TrainingDataError) as error:
            raise TrainingError(f"{kind} {path} cannot be read: {error}") from error
    if preview.control_mask is not None and preview.control is None:
        raise TrainingError(f"control_mask {preview.control_mask} without a control. Give one, or leave it out.")


def _check_images(preview: Preview, family: Family) -> None:
    name = type(family.pipeline).__name__
    images, references = preview.image or [], family.example_conditions.get("references")
    least, most = int(family.takes_image), references.most if references else int(family.takes_image)
    if images and not most:
        raise TrainingError(f"image {', '.join(images)}: {name} takes no image. Leave it out.")
    if not least <= len(images) <= most:
        several = "" if most == 1 else f", or for several references equally many, up to {most}, for each in turn"
        raise TrainingError(
            f"{name} needs an image for each sample, but this one has {len(images)}. Give one file for each prompt"
            f"{several}, with --validation_images or as `image` in a file of prompts."
        )
    if family.control_arguments and not images and preview.control is None:
        raise TrainingError(
            f"{name} draws from a control or from images. Give `control` or `image` for each prompt in a file of "
            "prompts, or images with --validation_images."
        )
    for path in images:
        read_image(path)


def guidance_of(config: TrainConfig, family: Family, preview: Preview) -> float:
    """The guidance scale of a sample."""
    given = config.validation_guidance if preview.guidance is None else preview.guidance
    return family.default_guidance if given is None else given


def read_image(path: str) -> Any:
    """Reads the image of a sample, as a PIL image in RGB.

    Raises:
        TrainingError: the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise TrainingError(f"image {path} cannot be read as an image: {error}") from error


def check_number_of_frames(name: str, number: int, family: Family) -> None:
    """Raises TrainingError if the model does not accept a number of frames, which is the setting `name`."""
    if family.kind == "image" and number != 1:
        raise TrainingError(f"{option(name, number)}: {type(family.pipeline).__name__} generates images. Leave it out.")
    try:
        check_frames(number, family.frame_rule)
    except TrainingDataError as error:
        raise TrainingError(f"{option(name, number)}: {error}") from error


def _check_multiples(what: str, size: list[int], family: Family) -> None:
    height, width = size
    multiple = family.size_multiple
    if height % multiple or width % multiple:
        near = " ".join(str(max(1, round(each / multiple)) * multiple) for each in (height, width))
        raise TrainingError(f"{what}: height and width must be multiples of {multiple} for this model, such as {near}.")


def _check_inputs(config: TrainConfig, family: Family, size: list[int] | None) -> None:
    """Calls the pipeline's own `check_inputs` with a size (height, width); None for one that every model accepts."""
    from PIL import Image

    check = getattr(family.pipeline, "check_inputs", None)
    if check is None:
        return
    known = inspect.signature(check).parameters
    height, width = size or (16 * family.size_multiple, 16 * family.size_multiple)
    given: dict[str, Any] = {"prompt": "a", "height": height, "width": width}
    given["max_sequence_length"] = family.max_sequence_length
    if family.takes_image:
        given[family.image_argument] = Image.new("RGB", (1, 1))
    called = inspect.signature(family.pipeline.__call__).parameters
    defaults = {name: called[name].default if name in called else None for name in known}
    arguments = {name: None if each is inspect.Parameter.empty else each for name, each in defaults.items()}
    try:
        check(**arguments | {name: each for name, each in given.items() if name in known})
    except ValueError as error:
        settings = [option("validation_size", size)] if size else []
        settings.append(option("max_sequence_length", family.max_sequence_length))
        raise TrainingError(
            f"{' or '.join(settings)} is not accepted by {type(family.pipeline).__name__}: {error}"
        ) from error
