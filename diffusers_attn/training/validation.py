"""Pictures and videos drawn with the adapter as it is, on all processes: in a group that shares sequences, all take
part in every forward, and a process that drew alone would wait for the others for ever."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import TrainConfig
from .data.disk import write_file
from .families import Family
from .models import decoding_in_its_dtype, placed, text_encoders
from .parallel import TrainingParallel
from .randomness import derived_seed
from .video import first_frame, write_video


class Sample(NamedTuple):
    """What was drawn for a prompt."""

    prompt: str
    path: Path


class Validation:
    """Prompts, encoded once, and how they are drawn.

    Args:
        config: the settings.
        family: whose pipeline draws; with text encoders, still.
        bucket: (frames, height, width) to draw in, where settings say nothing.
        device: where text encoders run.
        fps: of videos, the rate that is trained; None is the family's.
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
            scale = inspect.signature(family.pipeline.__call__).parameters[family.guidance_argument].default
        self.encoded: list[dict[str, Tensor]] = []
        if self.prompts:
            with placed(list(text_encoders(family.pipeline).values()), device):
                self.encoded = [family.prompt_arguments(each, None, guided=scale > 1) for each in self.prompts]

    def draw(
        self,
        folder: Path,
        parallel: TrainingParallel,
        device: torch.device,
        together: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Sample]:
        """Draws every prompt, always from the same noise. To be called on all processes.

        Args:
            folder: for the files; all processes see it.
            together: whether all processes draw every prompt, as FSDP2 needs it; otherwise groups divide them.
            stop: is asked before each prompt, on all processes at once, whether to leave it and the rest out.

        Returns:
            What was drawn, the same on all processes.
        """
        pipeline = self.family.pipeline
        transformer = pipeline.transformer
        was_training = transformer.training
        transformer.eval()
        first, step = (0, 1) if together else (parallel.dp_rank, parallel.dp_degree)
        writes = parallel.cp_rank == 0 and (not together or parallel.dp_rank == 0)
        samples = []
        with placed([pipeline.vae], device), decoding_in_its_dtype(pipeline.vae), torch.no_grad():
            for turn in range(-(-len(self.prompts) // step)):
                number = turn * step + first
                if stop():
                    break
                if number >= len(self.prompts):  # others have one more
                    continue
                generator = torch.Generator().manual_seed(derived_seed(self.seed, "validate", number))
                encoded = {name: each.to(device) for name, each in self.encoded[number].items()}
                output = pipeline(**self.call, **encoded, generator=generator, output_type="np")
                if writes:
                    drawn = output.images[0] if hasattr(output, "images") else output.frames[0]
                    name = f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', self.prompts[number].lower())[:40].strip('-')}"
                    samples.append((number, str(_save(drawn, folder / name, self.fps))))
        transformer.train(was_training)
        found = sorted(each for several in parallel.ranks.everyone(samples) for each in several)
        return [Sample(self.prompts[number], Path(path)) for number, path in found]


def _save(drawn: Any, path: Path, fps: float) -> Path:
    """Writes an image, [height, width, 3] in [0, 1], as PNG, or a video, [frames, height, width, 3], as MP4."""
    import numpy as np
    from PIL import Image

    pixels = (np.asarray(drawn).clip(0, 1) * 255).round().astype(np.uint8)
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
    """Gives pictures and videos to the trackers that show them. On one process."""
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
