"""Detects truncated and damaged images and videos by the lengths and end marks in their file formats.

Decoders fill missing data with grey or stop early, without an error. Here, damage raises a ValueError with the reason.
(PIL itself checks PNGs.)

Not detected: damage within the compressed data of JPEG, WebP and AVIF other than a run of zeros, since these formats
have no checksum; and zeros in BMP and uncompressed TIFF that start at the beginning of a row or in a black area.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot"}
"""Types of the first box in MP4, MOV and AVIF files."""


def check_image(data: bytes) -> None:
    """Raises a ValueError if a JPEG, WebP or AVIF file is truncated or damaged. Other formats pass."""
    try:
        _check_image(data)
    except (IndexError, struct.error) as error:
        raise ValueError("its segments do not match the length of the file") from error


def _check_image(data: bytes) -> None:
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        for name, start, end in _riff_chunks(data):
            if name in (b"VP8 ", b"VP8L", b"ANMF"):
                _check_zeros(data, start, end, 256)
    elif data[4:8] == b"ftyp":
        for name, start, end in _boxes(data):
            if name == b"mdat":
                _check_zeros(data, start, end, 256)


def check_pixels(pixels: Any) -> None:
    """Raises a ValueError if uncompressed pixels are truncated.

    They count as truncated if only zeros follow from the middle of a row, and the row above has no zeros in these
    columns.

    Args:
        pixels: array [height, width] or [height, width, channels].
    """
    black = (pixels == 0) if pixels.ndim == 2 else (pixels == 0).all(-1)
    for each in (black, black[::-1]):  # BMP stores the last row first
        filled = (~each).any(1).nonzero()[0]
        if not len(filled) or filled[-1] < 1 or len(each) - 1 - filled[-1] < len(each) // 16:
            continue
        row = int(filled[-1])
        column = int((~each[row]).nonzero()[0][-1]) + 1
        if column < each.shape[1] and not each[row - 1, column:].any() and not each[row - 1 : row + 1, :column].any():
            raise ValueError(f"only zeros follow from row {row if each is black else len(each) - 1 - row}")


def check_video(file: BinaryIO) -> None:
    """Raises a ValueError if a video file is shorter than its format states. Unknown formats pass."""
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    start = file.read(12)
    if start[4:8] in _BOXES:
        _check_boxes(file, size)
    elif start[:4] == b"\x1aE\xdf\xa3":
        _check_matroska(file, size)
    elif start[:4] == b"RIFF":
        _check_riff(file, size)
    elif start[:4] == b"GIF8":
        _check_gif(file, size)
    file.seek(0)


def _short(promised: int, there: int) -> ValueError:
    return ValueError(f"it is cut off: its header states {promised} bytes, but it has {there}")


def _check_zeros(data: bytes, start: int, end: int, most: int) -> None:
    """Raises a ValueError for `most` zero bytes in a row, which compressed data do not have."""
    at = data.find(b"\0" * most, start, end)
    if at >= 0:
        raise ValueError(f"zeros replace its data from byte {at}")


# ---- JPEG

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Start of a segment: excludes stuffed bytes and restart marks, which are parts of a scan, and padding."""


def _check_jpeg(data: bytes) -> None:
    at = 2
    first_symbol: dict[int, int] = {}
    while True:
        mark = _MARKER.search(data, at)  # decoders skip bytes between segments
        if mark is None:
            raise ValueError("it is cut off: its end mark is missing")
        at = mark.start()
        kind = data[at + 1]
        if kind == 0xD9:
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if kind == 0xC4:
            first_symbol.update(_first_symbols(segment))
        if kind == 0xDA:
            mark = _MARKER.search(data, at)
            end = len(data) if mark is None else mark.start()
            if not _zeros_are_valid(segment, first_symbol):
                _check_zeros(data, at, end, 32)
            if mark is None:
                raise ValueError("it is cut off: its end mark is missing")
            at = end


def _first_symbols(segment: bytes) -> Iterator[tuple[int, int]]:
    """The number of each Huffman table, and its symbol whose code has only zeros."""
    at = 0
    while at + 17 < len(segment):
        count = sum(segment[at + 1 : at + 17])
        yield segment[at], segment[at + 17]
        at += 17 + count


def _zeros_are_valid(scan: bytes, first_symbol: dict[int, int]) -> bool:
    """Whether a run of zeros in this scan can encode a flat area. With usual Huffman tables it encodes coefficients
    that no encoder writes."""
    number = scan[0]
    first, _, approximation = scan[1 + 2 * number : 4 + 2 * number]
    if approximation >> 4:  # a refinement scan, with bits outside of Huffman codes
        return True
    for component in range(number):
        tables = scan[2 + 2 * component]
        if first == 0 and first_symbol.get(tables >> 4, 0) != 0:
            return False
        if scan[2 + 2 * number] > 0 and first_symbol.get(0x10 | tables & 15, 0) & 15:
            return False
    return True


# ---- Boxes, chunks and elements


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of the content of each box in an AVIF file."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= len(data):
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        end = len(data) if size == 0 else at + size
        if end > len(data) or 0 < size < head:
            raise _short(end, len(data))
        yield name, at + head, end
        at = end


def _check_boxes(file: BinaryIO, size: int) -> None:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, name = struct.unpack(">I4s", head[:8])
        if not name.strip(b"\0"):
            return  # padding
        if length == 1:
            (length,) = struct.unpack(">Q", head[8:16].ljust(8, b"\xff"))
        if length == 0:
            return
        at += max(length, 8)
    if at > size:
        raise _short(at, size)


def _check_matroska(file: BinaryIO, size: int) -> None:
    at = 0
    for _ in range(2):  # the header, and the segment, which is the rest of the file
        file.seek(at)
        head = file.read(12)
        identifier = _vint_length(head[0]) if head else 1
        length = _vint_length(head[identifier]) if len(head) > identifier else 1
        if len(head) < identifier + length:
            raise _short(at + identifier + length, size)
        value = int.from_bytes(head[identifier : identifier + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:  # a stream of unknown length
            return
        at += identifier + length + value
    if at > size:
        raise _short(at, size)


def _vint_length(byte: int) -> int:
    return 9 - byte.bit_length()


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise _short(size + 8, len(data))
    at = 12
    while at + 8 <= size + 8:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            raise _short(at + 8 + length, len(data))
        yield name, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _check_riff(file: BinaryIO, size: int) -> None:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF":
            return
        at += 8 + length + length % 2
    if at > size + 1:
        raise _short(at, size)


def _check_gif(file: BinaryIO, size: int) -> None:
    file.seek(0)
    data = file.read()
    at = 13 + _palette(data[10])
    while at < size:
        kind = data[at]
        if kind == 0x3B:
            return
        if kind == 0x21:
            at += 2
        elif kind == 0x2C and at + 9 < size:
            at += 11 + _palette(data[at + 9])
        else:
            raise ValueError(f"byte {at} does not start a GIF block")
        while at < size and data[at]:
            at += 1 + data[at]
        at += 1
    if at > size:
        raise _short(at, size)


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
