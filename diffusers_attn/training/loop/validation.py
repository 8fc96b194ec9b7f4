"""Validation samples: images and videos generated during training.

All processes must take part. Processes that share sequences run every forward together, so a process that generated a
sample alone would wait for the others forever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...nested import mapped
from ..data.disk import write_file
from ..errors import TrainingError
from ..families import Family
from ..model.experts import evaluating
from ..model.pipeline import decoding_in_its_dtype, placed, text_encoders
from ..parallel import TrainingParallel
from ..randomness import derived_seed
from ..settings.config import TrainConfig
from ..settings.flag_names import option
from .video import first_frame, write_video


class Sample(NamedTuple):
    """A generated image or video."""

    prompt: str
    path: Path


class Validation:
    """The encoded validation prompts and the arguments of the pipeline's call.

    Args:
        config: the settings.
        family: family whose pipeline generates samples and still has its text encoders.
        bucket: default (frames, height, width) of the samples.
        device: device on which the text encoders run.
        fps: frame rate of video samples. None: the family's.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        bucket: Sequence[int],
        device: torch.device,
        fps: float | None = None,
    ) -> None:
        frames, height, width = bucket
        if config.validation_size is not None:
            height, width = config.validation_size
        self.prompts = config.validation_prompts or []
        self.seed = config.seed
        self.family = family
        self.fps = fps or family.fps
        self.call: dict[str, Any] = {
            "num_inference_steps": config.validation_steps,
            **family.size_arguments(config.validation_frames or frames, height, width),
        }
        scale = config.validation_guidance
        if scale is not None:
            self.call |= family.guidance_arguments(scale)
        else:
            scale = family.default_guidance
        self.images = config.validation_images or []
        self.encoded: list[dict[str, Any]] = []
        if self.prompts:
            with placed(list(text_encoders(family.pipeline).values()), device):
                for number, prompt in enumerate(self.prompts):
                    images = self._images(number, family.reference_size(height, width))
                    seeing = family.seeing(_pixels(images)) if family.text_has_pictures else family
                    arguments = seeing.prompt_arguments(prompt, None, guided=scale > 1)
                    if images:
                        arguments["image"] = images if len(images) > 1 else images[0]
                    self.encoded.append(arguments)

    def _images(self, number: int, size: tuple[int, int]) -> list[Any]:
        """The images of a prompt, equally many for each, as PIL images of `size` (height, width)."""
        from PIL import ImageOps

        each = len(self.images) // len(self.prompts)
        return [ImageOps.fit(read_image(path), size[::-1]) for path in self.images[number * each : (number + 1) * each]]

    def generate(
        self,
        folder: Path,
        parallel: TrainingParallel,
        device: torch.device,
        on_all_ranks: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Sample]:
        """Generates a sample for every prompt, each time from the same noise. All processes must call this.

        Args:
            folder: folder for the files, which all processes can access.
            parallel: the groups of processes that share sequences.
            device: device on which the VAE decodes.
            on_all_ranks: whether all processes generate every sample, as FSDP2 needs it. Otherwise the data-parallel
                groups divide the prompts.
            stop: called before each prompt on all processes; True skips this prompt and the rest.

        Returns:
            The samples in the order of the prompts, the same on all processes.
        """
        pipeline = self.family.pipeline
        first, step = (0, 1) if on_all_ranks else (parallel.dp_rank, parallel.dp_degree)
        writes = parallel.cp_rank == 0 and (not on_all_ranks or parallel.dp_rank == 0)
        samples = []
        with (
            placed(self.family.other_models, device),
            decoding_in_its_dtype(pipeline.vae),
            evaluating(self.family.trained),
        ):
            for turn in range(-(-len(self.prompts) // step)):
                number = turn * step + first
                if stop():
                    break
                if number >= len(self.prompts):  # other groups have one more prompt
                    continue
                generator = torch.Generator().manual_seed(derived_seed(self.seed, "validate", number))
                encoded = mapped(self.encoded[number], lambda tensor: tensor.to(device))
                output = pipeline(**self.call, **encoded, generator=generator, output_type="np")
                if writes:
                    pixels = output.images[0] if hasattr(output, "images") else output.frames[0]
                    name = f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', self.prompts[number].lower())[:40].strip('-')}"
                    samples.append((number, str(_save(pixels, folder / name, self.fps))))
        found = sorted(each for several in parallel.ranks.everyone(samples) for each in several)
        return [Sample(self.prompts[number], Path(path)) for number, path in found]


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
        raise TrainingError(f"{option('validation_images', path)} cannot be read as an image: {error}") from error


def _pixels(images: Sequence[Any]) -> torch.Tensor:
    """PIL images as float32 [1, images, 3, height, width] in [-1, 1]."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(each)).movedim(-1, 0) for each in images])[None] / 127.5 - 1


def check_images(config: TrainConfig, family: Family) -> None:
    """Raises TrainingError unless there are readable images for each prompt, if the pipeline needs images."""
    prompts, images = config.validation_prompts or [], config.validation_images or []
    name = type(family.pipeline).__name__
    if images and not family.takes_image:
        raise TrainingError(f"{option('validation_images', images)}: {name} takes no image. Leave it out.")
    most = max(1, family.most_references)
    if family.takes_image and len(images) not in range(len(prompts), most * len(prompts) + 1, max(1, len(prompts))):
        several = "" if most == 1 else f", or for several references equally many, up to {most}, for each in turn"
        raise TrainingError(
            f"{name} needs an image for each of the {len(prompts)} prompts of --validation_prompts, but "
            f"--validation_images has {len(images)}. Give one file for each prompt{several}, or leave both out."
        )
    for path in images:
        read_image(path)


def _save(output: Any, path: Path, fps: float) -> Path:
    """Writes an image, [height, width, 3] in [0, 1], as PNG, or a video, [frames, height, width, 3], as MP4."""
    import numpy as np
    from PIL import Image

    pixels = (np.asarray(output).clip(0, 1) * 255).round().astype(np.uint8)
    suffix = ".mp4" if pixels.ndim == 4 else ".png"
    target = path.with_name(path.name + suffix)

    def write(unfinished: Path) -> None:
        if pixels.ndim == 4:
            write_video(pixels, unfinished, fps)
        else:
            Image.fromarray(pixels).save(unfinished)

    write_file(target, write, "a sample")
    return target


def log_samples(accelerator: Any, samples: Sequence[Sample], step: int) -> None:
    """Logs samples to TensorBoard (of a video, its first frame) and Weights & Biases. Call it on one process."""
    import numpy as np
    from PIL import Image

    for tracker in accelerator.trackers:
        for number, sample in enumerate(samples):
            video = sample.path.suffix == ".mp4"
            if tracker.name == "tensorboard":
                picture = first_frame(sample.path) if video else np.asarray(Image.open(sample.path).convert("RGB"))
                tracker.writer.add_image(f"validation/{number}", picture, step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                kind: Any = wandb.Video if video else wandb.Image
                shown = kind(str(sample.path), caption=sample.prompt, **({"format": "mp4"} if video else {}))
                tracker.log({f"validation/{number}": shown}, step=step)
