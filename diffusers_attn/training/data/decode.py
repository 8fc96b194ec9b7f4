"""Decodes images with PIL and videos with PyAV. Both packages are imported at first use.

Frames are yielded one at a time as uint8, so that each can be resized before the next is decoded. A whole clip in a
camera's resolution takes gigabytes as float32.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import TrainingDataError
from .integrity import check_image, check_pixels, check_video
from .source import Source

if TYPE_CHECKING:
    from .examples import Example

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".gif"}
)
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".nef", ".arw"})
"""Suffixes of image formats that cannot be read."""
HOW_TO_INSTALL_PIL = "images are read with PIL; `pip install pillow`."
HOW_TO_INSTALL_VIDEO = "videos are read with PyAV; `pip install av`, which includes FFmpeg's libraries"
_BACKGROUND = (255, 255, 255)
"""Colour behind transparent parts of an image."""


class MissingDecoderError(ImportError):
    """The package that reads this kind of data is not installed. The message has the command that installs it."""


class Media(NamedTuple):
    """Properties of an image or video."""

    width: int
    """Width in pixels, after the rotation in the file's metadata."""
    height: int
    """Height in pixels, after the rotation."""
    frames: int
    fps: float | None
    """Average frame rate of a video; None for an image or if unknown."""
    times: tuple[float, ...] | None = None
    """Time of each frame in seconds from the first, for a video with a variable frame rate."""


def probe_image(source: Source) -> Media:
    """Reads the properties of an image, or of a GIF, from its header. The frame rate of a GIF is not read.

    Raises:
        TrainingDataError: the image cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, _ = _pil()
    with broken("image"), source.open() as file, image_module.open(file) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientations rotated by 90 degrees
            width, height = height, width
        frames = _pages(image)
        if frames > 1 and image.format != "GIF":
            raise ValueError(
                f"it has {frames} frames or pages, but an image has one. Save them as a video, or save one"
            )
        return Media(width, height, frames, None)


def _pages(image: Any) -> int:
    """Number of frames or pages, without thumbnails and the secondary images that cameras add to JPEGs."""
    if image.format in ("GIF", "WEBP", "PNG", "AVIF"):
        return int(getattr(image, "n_frames", 1))
    if image.format != "TIFF":
        return 1
    pages = 0
    for number in range(image.n_frames):
        image.seek(number)
        pages += not image.tag_v2.get(254, 0) & 1
    image.seek(0)
    return max(pages, 1)


def read_image(source: Source) -> Tensor:
    """Decodes an image to RGB, rotated as its metadata says, and on white where it is transparent.

    Returns:
        uint8 [3, height, width].

    Raises:
        TrainingDataError: the image cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, ops = _pil()
    with broken("image"), source.open() as file:
        data = file.read()
    with broken("image"), image_module.open(io.BytesIO(data)) as closed:
        closed.verify()  # the checksums of a PNG, which decoding skips
    with broken("image"), image_module.open(io.BytesIO(data)) as opened:
        check_image(data)
        if opened.format in ("BMP", "DIB", "TIFF"):
            import numpy as np

            check_pixels(np.asarray(opened))
        image = ops.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            # PIL clips values above 255; scaling them to 8 bits keeps the image.
            image = _eight_bits(image, image_module)
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = image_module.new("RGBA", image.size, (*_BACKGROUND, 255))
            image = image_module.alpha_composite(canvas, image)
        image = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def read_mask(source: Source, channel: str) -> Tensor:
    """Decodes a mask, rotated as its metadata says.

    Args:
        source: an image.
        channel: "luminance" of the image, or its "alpha", which is 255 everywhere if the image has none.

    Returns:
        uint8 [1, height, width].

    Raises:
        TrainingDataError: the image cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    if channel == "luminance":
        red, green, blue = read_image(source).float()
        return (0.299 * red + 0.587 * green + 0.114 * blue).round().byte()[None]
    image_module, ops = _pil()
    with broken("image"), source.open() as file, image_module.open(file) as opened:
        alpha = ops.exif_transpose(opened).convert("RGBA").getchannel("A")
        return torch.frombuffer(bytearray(alpha.tobytes()), dtype=torch.uint8).view(1, alpha.height, alpha.width)


def _eight_bits(image: Any, image_module: Any) -> Any:
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinity")
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if image.mode.startswith("I"):
        largest = 65535.0  # the mode of 16-bit PNGs and TIFFs
    else:
        largest = 1.0 if high <= 1.0 else 255.0
    if low < 0 or high > largest:
        accepted = "0 to 65535" if image.mode.startswith("I") else "0 to 1, or 0 to 255,"
        raise ValueError(f"its values go from {low:g} to {high:g}; {accepted} are accepted")
    return image_module.fromarray((values / largest * 255.0).round().astype(np.uint8))


def probe_video(source: Source) -> Media:
    """Reads the properties of a video from its header. Frames are counted if the header has no number.

    Raises:
        TrainingDataError: the video cannot be read, or is shorter than its header states.
        MissingDecoderError: PyAV is not installed.
    """
    av = pyav()
    with broken("video"), source.open() as file:
        check_video(file)
        media = _probe(av, file)
        if media.frames < 1 or media.width < 1 or media.height < 1:
            raise ValueError(f"it has {media.frames} frames of {media.width}x{media.height}")
        return media


def read_video(source: Source, picked: Sequence[int]) -> Iterator[Tensor]:
    """Decodes frames of a video.

    Args:
        source: the video.
        picked: numbers of the frames, from 0, in ascending order; a number may repeat.

    Yields:
        A frame, uint8 [3, height, width].

    Raises:
        TrainingDataError: the video cannot be read, or ends before the last of `picked`.
        MissingDecoderError: PyAV is not installed.
    """
    av = pyav()
    with broken("video"), source.open() as file:
        yield from _read(av, file, list(picked))


def read(example: Example, picked: Sequence[int]) -> Iterator[Tensor]:
    """Decodes frames of an image or video, uint8 [3, height, width] each. Raises as `read_video` does."""
    return read_video(example.source, picked) if example.kind == "video" else iter([read_image(example.source)])


@contextlib.contextmanager
def broken(what: str) -> Iterator[None]:
    """Turns every error of a decoder into a TrainingDataError."""
    try:
        yield
    except (MissingDecoderError, TrainingDataError, MemoryError, GeneratorExit):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingDataError(f"a broken {what}: {reason}") from error


def _pil() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDecoderError(f"{HOW_TO_INSTALL_PIL} ({error})") from error
    return Image, ImageOps


def pyav() -> Any:
    """PyAV. Raises MissingDecoderError."""
    try:
        import av
    except ImportError as error:
        raise MissingDecoderError(f"{HOW_TO_INSTALL_VIDEO} ({error})") from error
    return av


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    return container.streams.video[0]


def _upright(frame: Any) -> Any:
    """A frame as an array [height, width, 3], rotated as its metadata says."""
    import numpy as np

    return np.rot90(frame.to_ndarray(format="rgb24"), round((getattr(frame, "rotation", 0) or 0) / 90))


def _probe(av: Any, file: Any) -> Media:
    with av.open(file) as container:
        stream = _stream(container)
        fps = float(stream.average_rate or 0) or None
        # The header's index has the position of each frame. Without it, the entire file is demuxed below.
        index = [entry for entry in stream.index_entries if not entry.is_discard]
        ends = [entry.pos + entry.size for entry in index]
        if ends and max(ends) > container.size:
            present = sum(end <= container.size for end in ends)
            raise ValueError(f"its header states {len(ends)} frames, but it has {present}")
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("no frame in it can be decoded")
        height, width = _upright(frame).shape[:2]
        complete = bool(index) and len(stream.index_entries) == stream.frames
        shown = [entry.timestamp * float(stream.time_base or 0) for entry in index]  # in decoding order
    if complete and _regular(shown):
        return Media(width, height, len(index), fps)
    file.seek(0)
    with av.open(file) as container:
        number, times = _demuxed(container, _stream(container))
    if times is None or _regular(times):
        return Media(width, height, number, fps)
    return Media(width, height, number, (number - 1) / times[-1], times)


def _demuxed(container: Any, stream: Any) -> tuple[int, tuple[float, ...] | None]:
    """Counts the frames by reading the file. Also returns their times in seconds from the first; None if unknown."""
    shown, ends = [], []
    for packet in container.demux():
        if not packet.size:
            continue
        base = float(packet.time_base or 0)
        if packet.pts is not None:
            ends.append((packet.pts + (packet.duration or 0)) * base)
        if packet.stream.index == stream.index and not packet.is_discard:
            shown.append(None if packet.pts is None else packet.pts * base)
    stamps = sorted(each for each in shown if each is not None)
    if not stamps or len(stamps) < len(shown):
        return len(shown), None
    times = tuple(each - stamps[0] for each in stamps)
    if container.duration and ends:
        longest = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
        promised, there = container.duration / 1e6, max(ends)
        if promised - there > max(0.25, 2 * longest):
            raise ValueError(f"its header states {promised:.2f} s, but it ends after {there:.2f} s")
    return len(shown), times


def _regular(times: Sequence[float]) -> bool:
    """Whether the frame rate is constant, up to the container's rounding of times."""
    if len(times) < 3:
        return True
    mean = (times[-1] - times[0]) / (len(times) - 1)
    return mean > 0 and all(abs(b - a - mean) <= max(0.0015, 0.05 * mean) for a, b in itertools.pairwise(times))


def _read(av: Any, file: Any, picked: list[int]) -> Iterator[Tensor]:
    wanted = iter(picked)
    number = next(wanted, None)
    seen = 0
    with av.open(file) as container:
        stream = _stream(container)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if number is None:
                return
            if frame.is_corrupt:
                raise ValueError(f"frame {seen} is damaged")
            if seen == number:
                pixels = torch.from_numpy(_upright(frame).copy()).permute(2, 0, 1).contiguous()
                while number == seen:
                    yield pixels
                    number = next(wanted, None)
            seen += 1
    if number is not None:
        raise ValueError(f"it ends after {seen} frames, but number {number} is needed")
