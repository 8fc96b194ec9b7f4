"""Small pictures and videos, made for tests, and what encodes them there."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0, **options) -> Path:
    """A smooth picture of its own for each seed."""
    from PIL import Image

    coarse = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (height, width), mode="bilinear")[0].mul(255).byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, **options)
    return path


def video(path: Path, frames: int = 12, width: int = 64, height: int = 48, fps: int = 8, **options) -> Path:
    """A video that becomes bluer with time: blue is 20 times the number of the frame. The left upper corner is red.
    With `noise=True` it is noise, so that there is much of it to damage."""
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0) if options.pop("noise", False) else None
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[..., 2] = min(i * 20, 255)
            pixels[:8, :16] = (255, 0, 0)
            if noise is not None:
                pixels = noise.integers(0, 255, pixels.shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def sounding_video(
    path: Path, frames: int, width: int = 64, height: int = 48, fps: int = 24, codec: str = "flac",
    rate: int = 48_000, layout: str = "stereo", pitch: float = 300.0, begins: float = 0.0, seconds: float | None = None,
) -> Path:  # fmt: skip
    """A video, as `video` makes it, with a tone that rises: `tone` of the time in seconds since it began. The second
    channel is half as loud."""
    from fractions import Fraction

    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        track = container.add_stream(codec, rate=rate, layout=layout)
        for i in range(frames):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[..., 2] = min(i * 20, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        length = frames / fps - begins if seconds is None else seconds
        sound = tone(np.arange(round(length * rate)) / rate, pitch)
        channels = np.stack([sound, sound / 2][: 1 if layout == "mono" else 2]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(begins * rate), Fraction(1, rate)
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def tone(times, pitch: float = 300.0):
    """The sound of `sounding_video` at times in seconds since it began."""
    import numpy as np

    return 0.5 * np.sin(2 * np.pi * (pitch + 400 * times) * times)


def video_at(path: Path, times: list[int], codec: str = "mpeg4") -> Path:
    """A video whose frames are shown at these times, in milliseconds. Blue is 10 times the number of the frame."""
    from fractions import Fraction

    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=50)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[..., 2] = min(i * 10, 255)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def album(folder: Path, number: int, **size) -> Path:
    """A folder of `number` pictures, 00.png and on, with captions beside them."""
    for i in range(number):
        picture(folder / f"{i:02}.png", seed=i, **size)
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    return folder


def cut(path: Path, share: float) -> Path:
    """Leaves the first `share` of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """[batch, 3, frames, height, width] to a distribution an eighth as high and wide."""
    mean = F.avg_pool3d(pixels, (1, 8, 8))
    return {"latents_mean": mean, "latents_logvar": mean.abs() - 4}


def encode_text(captions: list[str]) -> dict[str, torch.Tensor]:
    """Embeddings as long as the longest caption of the batch."""
    longest = max(1, *map(len, captions))
    codes = torch.tensor([[ord(letter) for letter in caption.ljust(longest, "\0")] for caption in captions])
    return {"prompt_embeds": codes[..., None].float().expand(-1, -1, 2), "pooled": codes.float().sum(1, keepdim=True)}
