"""The number of tokens of an image or a video, by model class."""

from __future__ import annotations

import dataclasses

from ...errors import AttentionProviderError
from ...parallelize.typical_tokens import IMAGE, typical_tokens


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a class makes tokens of pixels."""

    factor: int
    """Pixels of a token in each direction: the compression of the VAE times the patch size."""
    frames_factor: int | None = None
    """Frames of a token: the VAE keeps the first frame, and compresses so many of the others. None for images."""
    text: int = 0
    """Tokens of text that attention joins with those of the image or video."""
    height: int = 1024
    """Default in pixels."""
    width: int = 1024
    """Default in pixels."""
    frames: int = 1
    """Default number of frames."""

    def tokens(self, height: int, width: int, frames: int) -> int:
        """Number of tokens, with the text."""
        times = 1 if self.frames_factor is None else (frames - 1) // self.frames_factor + 1
        return times * (height // self.factor) * (width // self.factor) + self.text


_IMAGE = Grid(16, text=512)
_WAN = Grid(16, 4, 0, 480, 832, 81)
GRIDS: dict[str, Grid] = {
    "AllegroTransformer3DModel": Grid(16, 4, 0, 720, 1280, 88),
    "AnyFlowTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": Grid(16, 4, 226, 480, 720, 49),
    "ConsisIDTransformer3DModel": Grid(16, 4, 226, 480, 720, 49),
    "CosmosTransformer3DModel": Grid(16, 8, 0, 704, 1280, 121),
    "EasyAnimateTransformer3DModel": Grid(16, 4, 0, 512, 512, 49),
    "HeliosTransformer3DModel": _WAN,
    "HunyuanVideo15Transformer3DModel": Grid(16, 4, 0, 480, 848, 121),
    "HunyuanVideoTransformer3DModel": Grid(16, 4, 256, 720, 1280, 129),
    "Ideogram4Transformer2DModel": Grid(16, height=2048, width=2048),
    "Kandinsky5Transformer3DModel": Grid(16, 4, 0, 512, 768, 121),
    "Kandinsky6Transformer3DModel": Grid(16, 4, 0, 512, 768, 121),
    "LTX2VideoTransformer3DModel": Grid(32, 8, 0, 512, 768, 121),
    "LTXVideoTransformer3DModel": Grid(32, 8, 0, 512, 704, 161),
    "MochiTransformer3DModel": Grid(16, 6, 256, 480, 848, 19),
    "SanaTransformer2DModel": Grid(32),
    "SkyReelsV2Transformer3DModel": Grid(16, 4, 0, 544, 960, 97),
    "WanAnimateTransformer3DModel": Grid(16, 4, 0, 720, 1280, 77),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
}
"""By class name. With the default sizes, the tokens are those of `parallelize/typical_tokens.py`."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The tokens of one forward."""

    tokens: int
    text: int
    """Number of these that are text."""
    words: str
    """How the number was found, for the report."""


def size_of(cls: type, height: int | None, width: int | None, frames: int | None, tokens: int | None) -> Size:
    """The tokens for a model of a class.

    Args:
        height: in pixels; None for the default of the class. The same for `width` and `frames`.
        tokens: the number itself, in place of the others.

    Raises:
        AttentionProviderError: sizes are given for a class whose tokens are not known, or in addition to `tokens`; or a
            size gives no token.
    """
    given = {"--height": height, "--width": width, "--frames": frames}
    given = {name: value for name, value in given.items() if value is not None}
    grid = next((GRIDS[each.__name__] for each in cls.__mro__ if each.__name__ in GRIDS), None)
    typical = typical_tokens(cls)
    if grid is None and typical == IMAGE:
        grid = _IMAGE
    text = grid.text if grid else 0
    if tokens is not None:
        if given:
            raise AttentionProviderError(f"--tokens replaces {', '.join(given)}: give one of them.")
        return Size(tokens, min(text, tokens // 2), f"{tokens:,} tokens")
    if grid is None:
        if given:
            raise AttentionProviderError(
                f"it is not known how {cls.__name__} makes tokens of {', '.join(given)}. Give --tokens."
            )
        return Size(typical, 0, f"{typical:,} tokens, as predictions assume for {cls.__name__}")
    if frames is not None and grid.frames_factor is None:
        raise AttentionProviderError(f"{cls.__name__} makes images: leave --frames out.")
    height, width, frames = height or grid.height, width or grid.width, frames or grid.frames
    found = grid.tokens(height, width, frames)
    if found <= grid.text:
        raise AttentionProviderError(
            f"{height} x {width} gives no token: one has {grid.factor} x {grid.factor} pixels."
        )
    of = f"{frames} frames of " if grid.frames_factor is not None else ""
    with_text = f", with {grid.text} of text" if grid.text else ""
    return Size(found, grid.text, f"{of}{height} x {width}: {found:,} tokens{with_text}")
