"""The samples that a run draws: a prompt each, with settings of its own that a file of prompts may have."""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from .bounds import COUNT, NOT_NEGATIVE, Bounds
from .entries import entries_of
from .flag_names import option
from .run_file import parse_yaml
from .setting import setting

LINES, TABLES = ".txt", (".yaml", ".yml", ".json")
"""Suffixes of files with a prompt in each line, and of those with a list of tables."""


@dataclasses.dataclass(frozen=True)
class Preview:
    """A sample. In a file of prompts it is an entry of the list."""

    prompt: str = setting("", "Prompt of the sample")
    negative_prompt: str | None = setting(None, "Negative prompt (default: the empty one)")
    seed: int | None = setting(
        None, "Seed of the sample's noise (default: from that of the run)", bounds=Bounds(0, 2**63 - 1)
    )
    size: list[int] | None = setting(
        None, "Height and width in pixels (default: --validation_size)", bounds=COUNT, length=2
    )
    frames: int | None = setting(None, "Number of frames (default: --validation_frames)", bounds=COUNT)
    image: list[str] | None = setting(
        None, "File of the image that the sample begins with or edits, or several files (default: none)"
    )
    control: str | None = setting(None, "File of the control picture or video (default: none)")
    control_mask: str | None = setting(None, "File of the mask of the control, a picture or video (default: none)")
    steps: int | None = setting(None, "Number of denoising steps (default: --validation_steps)", bounds=Bounds(1, 1000))
    guidance: float | None = setting(None, "Guidance scale (default: --validation_guidance)", bounds=NOT_NEGATIVE)


def previews_of(prompts: Sequence[str], images: Sequence[str]) -> list[Preview]:
    """The samples of a run.

    Args:
        prompts: the prompts; or one name of a file that ends in .txt, with a prompt in each line, or in .yaml, .yml or
            .json, with a list of tables of the settings of `Preview`.
        images: files of images, equally many for each of the prompts in turn; empty for samples without, and with a
            file of prompts.

    Raises:
        TrainingError: the file cannot be read or an entry is not accepted, or the images do not belong to the prompts.
    """
    if len(prompts) != 1 or Path(prompts[0]).suffix.lower() not in (LINES, *TABLES):
        if images and len(images) % len(prompts):
            raise TrainingError(
                f"--validation_images has {len(images)} files for the {len(prompts)} prompts of --validation_prompts. "
                "Give one file for each prompt, or for several references equally many, or leave it out."
            )
        each = len(images) // max(1, len(prompts))
        return [
            Preview(prompt, image=list(images[i * each : (i + 1) * each]) or None) for i, prompt in enumerate(prompts)
        ]
    path = Path(prompts[0])
    what = option("validation_prompts", str(path))
    if images:
        raise TrainingError(
            f"{option('validation_images', list(images))} with {what}, a file of prompts, which has an `image` for "
            "each. Leave --validation_images out."
        )
    found = _read(path, what)
    if not found:
        raise TrainingError(f"{what}: the file has no prompts.")
    return found


def _read(path: Path, what: str) -> list[Preview]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise TrainingError(f"{what}, a file of prompts, cannot be read: {reason}.") from error
    if path.suffix.lower() == LINES:
        return [Preview(line.strip()) for line in text.splitlines() if line.strip()]
    entries: Any = parse_yaml(path, text)
    return entries_of(Preview, [] if entries is None else entries, what, required="prompt")
