"""What a run logs, evaluates and draws while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import COUNT, NOT_NEGATIVE, Bounds
from ..setting import setting


@dataclass
class ValidationSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "logging, validation and evaluation"

    log_every: int = setting(1, "Number of steps between log entries", bounds=COUNT)
    metrics: bool = setting(True, "Write log entries to metrics.jsonl in output_dir, one JSON object per line")
    trackers: list[str] | None = setting(
        None, "Accelerate's experiment trackers to log to, such as tensorboard or wandb (default: none)"
    )
    tracker_project: str = setting("diffusers_attn", "Project name at the trackers", needs=("trackers",))
    validation_prompts: list[str] | None = setting(
        None,
        "Prompts from which samples are generated during training and for the model card, or a file of them: .txt with "
        "one in each line, or .yaml or .json with a list of prompt, negative_prompt, seed, size, frames, image, "
        "control, control_mask, steps and guidance (default: none)",
    )
    validation_images: list[str] | None = setting(
        None,
        "Files of the images that samples begin with, one for each of validation_prompts, for models that need one",
        needs=("validation_prompts",),
    )
    validation_at_start: bool = setting(
        True, "Generate samples before the first step as well, to compare with", needs=("validation_prompts",)
    )
    validation_every: int = setting(
        250,
        "Number of steps between samples; 0 generates them at the end only",
        bounds=NOT_NEGATIVE,
        needs=("validation_prompts",),
    )
    validation_steps: int = setting(
        28, "Number of denoising steps per sample", bounds=Bounds(1, 1000), needs=("validation_prompts",)
    )
    validation_guidance: float | None = setting(
        None,
        "Guidance scale of the samples (default: the pipeline's)",
        bounds=NOT_NEGATIVE,
        needs=("validation_prompts",),
    )
    validation_size: list[int] | None = setting(
        None,
        "Height and width of the samples in pixels (default: those of the first example's bucket)",
        bounds=COUNT,
        length=2,
        needs=("validation_prompts",),
    )
    validation_frames: int | None = setting(
        None,
        "Number of frames of video samples (default: that of the first example's bucket)",
        bounds=COUNT,
        needs=("validation_prompts",),
    )
    validation_lossless: bool = setting(
        False,
        "Write video samples without loss, too: as .mkv files (FFV1) beside the .mp4 files",
        needs=("validation_prompts",),
    )
    evaluation_every: int = setting(
        0, "Number of steps between evaluations of the loss at fixed noise levels; 0 is never", bounds=NOT_NEGATIVE
    )
    evaluation_data: str | None = setting(
        None,
        "Data for evaluations, in the form of --data (default: the first examples of --data)",
        needs=("evaluation_every",),
    )
    evaluation_examples: int = setting(
        4, "Number of examples per evaluation", bounds=COUNT, needs=("evaluation_every",)
    )
