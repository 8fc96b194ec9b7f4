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
from ..data.buckets import Bucket
from ..data.disk import write_file
from ..families import Family
from ..families.latents import Waveform
from ..model.experts import evaluating
from ..model.pipeline import decoding_in_its_dtype, placed, text_models
from ..parallel import TrainingParallel
from ..randomness import derived_seed
from ..settings.config import TrainConfig
from ..settings.previews import Preview
from .gallery import describe, write_gallery
from .preview_checks import guidance_of, read_image
from .sample_controls import control_frames
from .video import first_frame, write_lossless, write_video


class Sample(NamedTuple):
    """A generated image or video."""

    number: int
    """Number of its prompt, from 0."""
    prompt: str
    path: Path


class Validation:
    """The encoded prompts of the samples, and the arguments of the pipeline's call for each.

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
        self.previews = config.previews
        self.family = family
        self.fps = fps or family.fps
        self.lossless = config.validation_lossless
        self.calls: list[dict[str, Any]] = []
        """The arguments of the pipeline's call for each sample."""
        self.seeds = [
            derived_seed(config.seed, "validate", number) if each.seed is None else each.seed
            for number, each in enumerate(self.previews)
        ]
        if self.previews:
            with placed(list(text_models(family.pipeline).values()), device):
                self.calls = [self._call(config, each, bucket) for each in self.previews]

    def _call(self, config: TrainConfig, preview: Preview, bucket: Sequence[int]) -> dict[str, Any]:
        family = self.family
        frames, *size = bucket
        height, width = preview.size or config.validation_size or size
        frames = preview.frames or config.validation_frames or frames
        scale = config.validation_guidance if preview.guidance is None else preview.guidance
        guided = guidance_of(config, family, preview) > 1
        size_of_images = None if family.references_have_borders else family.reference_size(height, width)
        images = [_fitted(path, size_of_images) for path in preview.image or []]
        seeing = family.seeing(_pixels(images)) if family.text_has_pictures else family
        call = {
            "num_inference_steps": preview.steps or config.validation_steps,
            **family.size_arguments(frames, height, width),
            **({} if scale is None else family.guidance_arguments(scale)),
            **seeing.prompt_arguments(preview.prompt, preview.negative_prompt, guided=guided),
        }
        if images:
            call[family.image_argument] = images if len(images) > 1 else images[0]
        for name, argument in family.control_arguments.items():
            path = getattr(preview, name)
            if path is not None:
                call[argument] = control_frames(path, Bucket(frames, height, width), self.fps)
        return call

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
            for turn in range(-(-len(self.previews) // step)):
                number = turn * step + first
                if stop():
                    break
                if number >= len(self.previews):  # other groups have one more prompt
                    continue
                generator = torch.Generator().manual_seed(self.seeds[number])
                call = mapped(self.calls[number], lambda tensor: tensor.to(device))
                output = pipeline(**call, generator=generator, output_type="np")
                if writes:
                    pixels = output.images[0] if hasattr(output, "images") else output.frames[0]
                    words = re.sub(r"[^a-z0-9]+", "-", self.previews[number].prompt.lower())[:40].strip("-")
                    name = folder / f"{number:02d}-{words}"
                    path = _save(pixels, name, self.fps, self.lossless, self.family.drawn_sound(output))
                    samples.append((number, str(path)))
        found = sorted(each for several in parallel.ranks.everyone(samples) for each in several)
        return [Sample(number, self.previews[number].prompt, Path(path)) for number, path in found]

    def describe(self, samples: Sequence[Sample], step: int) -> None:
        """Writes what samples of one folder are into that folder, and all samples of the run into a page above it."""
        folder = samples[0].path.parent
        about = [
            {
                "number": number,
                "prompt": prompt,
                "file": path.name,
                "seed": self.previews[number].seed,
                "negative prompt": self.previews[number].negative_prompt,
                "image": ", ".join(self.previews[number].image or []) or None,
                "control": self.previews[number].control,
                "control mask": self.previews[number].control_mask,
            }
            for number, prompt, path in samples
        ]
        describe(folder, step, about)
        write_gallery(folder.parent, f"Samples of {folder.parent.parent.name}")


def _save(output: Any, path: Path, fps: float, lossless: bool, sound: Waveform | None = None) -> Path:
    """Writes an image, [height, width, 3] in [0, 1], as PNG, or a video, [frames, height, width, 3], as MP4.

    Args:
        output: the image or video.
        path: name of the file without its suffix.
        fps: frame rate of a video.
        lossless: whether a video is written as MKV without loss as well.
        sound: the sound of a video.
    """
    import numpy as np
    from PIL import Image

    pixels = (np.asarray(output).clip(0, 1) * 255).round().astype(np.uint8)
    suffix = ".mp4" if pixels.ndim == 4 else ".png"
    target = path.with_name(path.name + suffix)

    def write(unfinished: Path) -> None:
        if pixels.ndim == 4:
            write_video(pixels, unfinished, fps, sound)
        else:
            Image.fromarray(pixels).save(unfinished)

    write_file(target, write, "a sample")
    if lossless:
        without_loss = path.with_name(path.name + ".mkv")
        write_file(without_loss, lambda unfinished: write_lossless(pixels, unfinished, fps, sound), "a sample")
    return target


def _fitted(path: str, size: tuple[int, int] | None) -> Any:
    """The image in a file as a PIL image of `size` (height, width); None keeps its own."""
    from PIL import ImageOps

    return read_image(path) if size is None else ImageOps.fit(read_image(path), size[::-1])


def _pixels(images: Sequence[Any]) -> torch.Tensor:
    """PIL images as float32 [1, images, 3, height, width] in [-1, 1]."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(each)).movedim(-1, 0) for each in images])[None] / 127.5 - 1


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
