"""What is made of the data before the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds
from ..choices import CLIPS, MASKS
from ..setting import setting


@dataclass
class PreparationSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "data preparation"

    resolution: list[int] = setting(
        [512],
        "Side in pixels of a square with the same area as each bucket; several values make several sets of buckets",
        bounds=Bounds(1, 2**14),
    )
    aspects: list[float] | None = setting(
        None,
        "Aspect ratios of the buckets, width / height (default: 11 common ratios from 1:2 to 2:1)",
        bounds=Bounds(1 / 32, 32),
    )
    num_frames: list[int] | None = setting(
        None,
        "Number of frames per bucket; several values make several sets of buckets (default: 1 for images; for videos "
        "49, or the nearest number below that the model accepts)",
        bounds=COUNT,
    )
    fps: float | None = setting(
        None,
        "Frames per second to which videos are resampled by the times of their frames; 0 keeps each video's own rate "
        "(default: the model's rate)",
        bounds=NOT_NEGATIVE,
    )
    clips: str = setting(
        "middle",
        "Clips taken from each video: one from its head or middle, N evenly spaced ones, or all, one after the other; "
        f"given as {', '.join(CLIPS)}",
        forms=CLIPS,
    )
    frame_pick: str = setting(
        "consecutive",
        "Frames taken from a video: consecutive ones, or ones spread over its whole length",
        ("consecutive", "spread"),
    )
    max_upscale: float = setting(
        1.25, "Largest factor by which an example may be enlarged to fill its bucket", bounds=POSITIVE
    )
    crop: str = setting("centre", "Part of an example that is kept if it exceeds its bucket", ("centre", "random"))
    repeats: int = setting(1, "Number of times each example is used per epoch", bounds=COUNT)
    incomplete_batches: str = setting(
        "fill", "Fill a bucket's last, incomplete batch with repeated examples, or drop it", ("fill", "drop")
    )
    caption_column: str | None = setting(
        None, "Column of the metadata or dataset that holds the captions (default: caption, text or prompt)"
    )
    caption_lines: bool = setting(
        False, "Each line of a .txt file is a caption of its own, of which one is drawn at each use"
    )
    trigger_word: str | None = setting(
        None, "Word that replaces [trigger] in captions, or is put before those that lack it (default: none)"
    )
    shuffle_tags: int | None = setting(
        None,
        "Number of orders of each caption's comma-separated tags that are encoded, of which one is drawn at each use "
        "(default: only the given order)",
        bounds=COUNT,
    )
    keep_tags: int = setting(
        0,
        "Number of tags at the beginning of a caption that keep their place",
        bounds=NOT_NEGATIVE,
        needs=("shuffle_tags",),
    )
    caption_dropout: float = setting(
        0.1,
        "Probability with which a caption is replaced by the empty one, for classifier-free guidance",
        bounds=PROBABILITY,
    )
    max_sequence_length: int | None = setting(
        None, "Maximum number of text tokens per caption (default: the pipeline's)", bounds=COUNT
    )
    loss_mask: str = setting(
        "none",
        "Masks of the loss, white or opaque where it counts: files are a_mask.png for a.png or a.mp4 in --data, alpha "
        "is the transparency of images",
        MASKS,
    )
    on_bad_data: str = setting(
        "refuse", "Stop before training if an example cannot be read, or skip it with a warning", ("refuse", "skip")
    )
    cache_dir: str | None = setting(
        None, "Folder for cached latents and text embeddings (default: the folder cache in output_dir)"
    )
    cache_batch_size: int = setting(
        1, "Number of examples that the VAE encodes at once; captions are encoded one by one", bounds=COUNT
    )
