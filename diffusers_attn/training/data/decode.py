"""Pictures and videos into pixels: PIL for pictures; for videos torchcodec, or PyAV where torchcodec is not usable.

Frames come one after the other as bytes, so that they can be made smaller before the next one is there: a clip in the
size that a camera gives it takes gigabytes as floats. All of these packages are imported when first needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import TrainingDataError
from .source import Source

if TYPE_CHECKING:
    from .examples import Example

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif"})
HOW_TO_INSTALL_PIL = "pictures are read with PIL; `pip install pillow`."
HOW_TO_INSTALL_VIDEO = (
    "videos are read with torchcodec (`pip install torchcodec`, and FFmpeg's libraries, for instance `apt-get install "
    "ffmpeg`) or with PyAV (`pip install av`, which brings them along)"
)


class MissingDecoderError(ImportError):
    """No package that reads this kind of data can be used here; says what to install. Not the data's fault."""


class Media(NamedTuple):
    """What the header of a picture or video says."""

    width: int
    """as it is seen, after the rotation that a camera noted."""
    height: int
    frames: int
    fps: float | None
    """of a video; None for a picture."""


def probe_image(source: Source) -> Media:
    """What the header of a picture says.

    Raises:
        TrainingDataError: it cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, _ = _pil()
    with _broken("picture"), source.open() as file, image_module.open(file) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # the orientations that lie on their side
            width, height = height, width
        return Media(width, height, 1, None)


def read_image(source: Source, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """A picture as it is seen: turned as the camera noted, its palette looked up, on `background` where transparent.

    Returns:
        uint8 [3, height, width].

    Raises:
        TrainingDataError: it cannot be read.
        MissingDecoderError: PIL is not installed.
    """
    image_module, ops = _pil()
    with _broken("picture"), source.open() as file, image_module.open(file) as opened:
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

    values = np.asarray(image)
    if image.mode.startswith("I"):
        whole = 65535.0  # what 16-bit PNGs and TIFFs open as
    else:
        whole = 1.0 if float(values.max(initial=0.0)) <= 1.0 else 255.0
    return image_module.fromarray((values.astype(np.float64) / whole * 255.0).round().clip(0, 255).astype(np.uint8))


def probe_video(source: Source) -> Media:
    """What the header of a video says, and its number of frames; where no header has that, they are counted.

    Raises:
        TrainingDataError: it cannot be read.
        MissingDecoderError: neither torchcodec nor PyAV can be used.
    """
    decoder = video_decoder()
    with _broken("video"), source.open() as file:
        media: Media = _VIDEO[decoder][0](file)
        if media.frames < 1 or media.width < 1 or media.height < 1:
            raise ValueError(f"it has {media.frames} frames of {media.width}x{media.height}")
        return media


def read_video(source: Source, picked: Sequence[int]) -> Iterator[Tensor]:
    """The frames of a video with these numbers, which rise or stay the same.

    Yields:
        uint8 [3, height, width] each.

    Raises:
        TrainingDataError: it cannot be read, or ends before the last of `picked`.
        MissingDecoderError: neither torchcodec nor PyAV can be used.
    """
    decoder = video_decoder()
    with _broken("video"), source.open() as file:
        yield from _VIDEO[decoder][1](file, list(picked))


def read(example: Example, picked: Sequence[int]) -> Iterator[Tensor]:
    """The frames of `example` with these numbers, uint8 [3, height, width] each. Raises as `read_video` does."""
    return read_video(example.source, picked) if example.kind == "video" else iter([read_image(example.source)])


@functools.cache
def video_decoder() -> str:
    """ "torchcodec" where it can be used, else "av".

    Raises:
        MissingDecoderError: neither can be; says why, and what to install.
    """
    try:
        # It raises others than ImportError where it is installed and FFmpeg's libraries are not.
        _load_torchcodec()
        return "torchcodec"
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        import av  # noqa: F401

        return "av"
    except ImportError as error:
        raise MissingDecoderError(f"{HOW_TO_INSTALL_VIDEO}. torchcodec: {why}; av: {error}.") from error


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


def _load_torchcodec() -> None:
    """Raises RuntimeError where it can be imported but not used: some look for FFmpeg only when they decode."""
    try:
        _torchcodec()(b"")
    except RuntimeError as error:
        if "libtorchcodec" in str(error):
            raise
    except ValueError:
        pass  # no video in no bytes


def _torchcodec() -> Any:
    return importlib.import_module("torchcodec.decoders").VideoDecoder


def _probe_torchcodec(file: Any) -> Media:
    decoder = _torchcodec()(file)
    metadata = decoder.metadata
    # A frame says best what frames are like: which sizes a header gives changed between versions.
    height, width = decoder[0].shape[-2:]
    promised = metadata.num_frames_from_header
    if promised and promised > len(decoder):
        raise ValueError(f"its header promises {promised} frames, and {len(decoder)} are there")
    return Media(width, height, len(decoder), float(metadata.average_fps or 0) or None)


def _read_torchcodec(file: Any, picked: list[int]) -> Iterator[Tensor]:
    decoder = _torchcodec()(file)
    if picked[-1] >= len(decoder):
        raise ValueError(f"it ends after {len(decoder)} frames, and number {picked[-1]} is needed")
    for number in picked:
        yield decoder[number]


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it has no stream of pictures")
    return container.streams.video[0]


def _upright(frame: Any) -> Any:
    """The frame as an array [height, width, 3], turned as the camera noted."""
    import numpy as np

    return np.rot90(frame.to_ndarray(format="rgb24"), round((getattr(frame, "rotation", 0) or 0) / 90))


def _probe_av(file: Any) -> Media:
    import av

    with av.open(file) as container:
        stream = _stream(container)
        fps = float(stream.average_rate or 0) or None
        # An index that was in the header says where frames are; demuxing would find that out by reading all.
        ends = [entry.pos + entry.size for entry in stream.index_entries]
        if ends and max(ends) > container.size:
            there = sum(end <= container.size for end in ends)
            raise ValueError(f"its header promises {len(ends)} frames, and {there} are there")
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("no frame in it can be decoded")
        height, width = _upright(frame).shape[:2]
        frames = stream.frames
    if not frames:  # Matroska's header has no number
        file.seek(0)
        with av.open(file) as container:
            frames = sum(1 for packet in container.demux(_stream(container)) if packet.size)
    return Media(width, height, frames, fps)


def _read_av(file: Any, picked: list[int]) -> Iterator[Tensor]:
    import av

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


_VIDEO = {"torchcodec": (_probe_torchcodec, _read_torchcodec), "av": (_probe_av, _read_av)}
