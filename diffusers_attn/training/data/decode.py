"""Pictures and videos into pixels: PIL for pictures, PyAV for videos.

Frames come one after the other as bytes, so that they can be made smaller before the next one is there: a clip in the
size that a camera gives it takes gigabytes as floats. Both packages are imported when first needed.
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
from .integrity import check_picture, check_pixels, check_video
from .source import Source

if TYPE_CHECKING:
    from .examples import Example

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".gif"}
)
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".nef", ".arw"})
"""pictures that are not read here."""
HOW_TO_INSTALL_PIL = "pictures are read with PIL; `pip install pillow`."
HOW_TO_INSTALL_VIDEO = "videos are read with PyAV; `pip install av`, which brings FFmpeg's libraries along"


class MissingDecoderError(ImportError):
    """No package that reads this kind of data can be used here; says what to install. Not the data's fault."""


class Media(NamedTuple):
    """What the header of a picture or video says."""

    width: int
    """as it is seen, after the rotation that a camera noted."""
    height: int
    frames: int
    fps: float | None
    """of a video, on average; None for a picture."""
    times: tuple[float, ...] | None = None
    """of a video whose rate varies: when each frame is shown, in seconds from the first."""


def probe_image(source: Source) -> Media:
    """What the header of a picture or of a GIF says; of a GIF, all about its frames but their times.

    Raises:
        TrainingDataError: it cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, _ = _pil()
    with _broken("picture"), source.open() as file, image_module.open(file) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # the orientations that lie on their side
            width, height = height, width
        frames = _pages(image)
        if frames > 1 and image.format != "GIF":
            raise ValueError(f"it has {frames} frames or pages, and a picture has one. Save them as a video, or one")
        return Media(width, height, frames, None)


def _pages(image: Any) -> int:
    """How many frames or pages a file has, without thumbnails and the second views that cameras add to JPEGs."""
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


def read_image(source: Source, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """A picture as it is seen: turned as the camera noted, its palette looked up, on `background` where transparent.

    Returns:
        uint8 [3, height, width].

    Raises:
        TrainingDataError: it cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, ops = _pil()
    with _broken("picture"), source.open() as file:
        data = file.read()
    with _broken("picture"), image_module.open(io.BytesIO(data)) as opened:
        check_picture(data)
        if opened.format in ("BMP", "DIB", "TIFF"):
            import numpy as np

            check_pixels(np.asarray(opened))
        image = ops.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            # PIL cuts more than 8 bits off at 255; as shares of the whole range they keep their picture.
            image = _eight_bits(image, image_module)
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = image_module.new("RGBA", image.size, (*background, 255))
            image = image_module.alpha_composite(canvas, image)
        image = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _eight_bits(image: Any, image_module: Any) -> Any:
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinity")
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if image.mode.startswith("I"):
        whole = 65535.0  # what 16-bit PNGs and TIFFs open as
    else:
        whole = 1.0 if high <= 1.0 else 255.0
    if low < 0 or high > whole:
        accepted = "0 to 65535" if image.mode.startswith("I") else "0 to 1, or 0 to 255,"
        raise ValueError(f"its values go from {low:g} to {high:g}, and {accepted} are accepted")
    return image_module.fromarray((values / whole * 255.0).round().astype(np.uint8))


def probe_video(source: Source) -> Media:
    """What the header of a video says, and how many frames it has; where no header has that, they are counted.

    Raises:
        TrainingDataError: it cannot be read, or ends before its header says.
        MissingDecoderError: PyAV is not installed.
    """
    av = _av()
    with _broken("video"), source.open() as file:
        check_video(file)
        media = _probe(av, file)
        if media.frames < 1 or media.width < 1 or media.height < 1:
            raise ValueError(f"it has {media.frames} frames of {media.width}x{media.height}")
        return media


def read_video(source: Source, picked: Sequence[int]) -> Iterator[Tensor]:
    """The frames of a video with these numbers, which rise or stay the same.

    Yields:
        uint8 [3, height, width] each.

    Raises:
        TrainingDataError: it cannot be read, or ends before the last of `picked`.
        MissingDecoderError: PyAV is not installed.
    """
    av = _av()
    with _broken("video"), source.open() as file:
        yield from _read(av, file, list(picked))


def read(example: Example, picked: Sequence[int]) -> Iterator[Tensor]:
    """The frames of `example` with these numbers, uint8 [3, height, width] each. Raises as `read_video` does."""
    return read_video(example.source, picked) if example.kind == "video" else iter([read_image(example.source)])


@contextlib.contextmanager
def _broken(what: str) -> Iterator[None]:
    """Decoders raise whatever they like; here it is one error, and it is the data's."""
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


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDecoderError(f"{HOW_TO_INSTALL_VIDEO} ({error})") from error
    return av


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it has no stream of pictures")
    return container.streams.video[0]


def _upright(frame: Any) -> Any:
    """The frame as an array [height, width, 3], turned as the camera noted."""
    import numpy as np

    return np.rot90(frame.to_ndarray(format="rgb24"), round((getattr(frame, "rotation", 0) or 0) / 90))


def _probe(av: Any, file: Any) -> Media:
    with av.open(file) as container:
        stream = _stream(container)
        fps = float(stream.average_rate or 0) or None
        # An index that was in the header says where frames are; demuxing would find that out by reading all.
        index = [entry for entry in stream.index_entries if not entry.is_discard]
        ends = [entry.pos + entry.size for entry in index]
        if ends and max(ends) > container.size:
            there = sum(end <= container.size for end in ends)
            raise ValueError(f"its header promises {len(ends)} frames, and {there} are there")
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("no frame in it can be decoded")
        height, width = _upright(frame).shape[:2]
        complete = bool(index) and len(stream.index_entries) == stream.frames
        shown = [entry.timestamp * float(stream.time_base or 0) for entry in index]  # in the order of decoding
    if complete and _regular(shown):
        return Media(width, height, len(index), fps)
    file.seek(0)
    with av.open(file) as container:
        number, times = _demuxed(container, _stream(container))
    if times is None or _regular(times):
        return Media(width, height, number, fps)
    return Media(width, height, number, (number - 1) / times[-1], times)


def _demuxed(container: Any, stream: Any) -> tuple[int, tuple[float, ...] | None]:
    """How many frames there are, and when they are shown, in seconds from the first; None where nothing says it."""
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
            raise ValueError(f"its header promises {promised:.2f} s, and it ends after {there:.2f} s")
    return len(shown), times


def _regular(times: Sequence[float]) -> bool:
    """Whether frames follow each other at one rate, but for what a container rounds."""
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
        raise ValueError(f"it ends after {seen} frames, and number {number} is needed")
