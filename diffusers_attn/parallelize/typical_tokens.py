"""The number of tokens that a prediction assumes for a model. When a model is enabled, its inputs are not known yet.

The sizes are the defaults of diffusers' pipelines, and the compression factors are those of the models' VAEs and
patches. A prediction depends on tokens slowly: where two strategies swap places, they take about the same time.
"""

from __future__ import annotations

TYPICAL_TOKENS: dict[str, int] = {
    # Videos: frames * height * width after the VAE and the patches, and the text where attention joins both.
    "AllegroTransformer3DModel": 79_200,  # 88 frames of 720 x 1280: 22 * 45 * 80
    "CogVideoXTransformer3DModel": 17_776,  # 49 frames of 480 x 720: 13 * 30 * 45 + 226
    "ConsisIDTransformer3DModel": 17_776,  # as CogVideoX
    "CosmosTransformer3DModel": 56_320,  # 121 frames of 704 x 1280: 16 * 44 * 80
    "EasyAnimateTransformer3DModel": 13_312,  # 49 frames of 512 x 512: 13 * 32 * 32
    "HunyuanVideo15Transformer3DModel": 49_290,  # 121 frames of 480 x 848, VAE of factor 16: 31 * 30 * 53
    "HunyuanVideoTransformer3DModel": 119_056,  # 129 frames of 720 x 1280: 33 * 45 * 80 + 256
    "Kandinsky5Transformer3DModel": 47_616,  # 121 frames of 512 x 768: 31 * 32 * 48
    "Kandinsky6Transformer3DModel": 47_616,  # as Kandinsky 5
    "LTX2VideoTransformer3DModel": 6_144,  # 121 frames of 512 x 768: 16 * 16 * 24
    "LTXVideoTransformer3DModel": 7_392,  # 161 frames of 512 x 704: 21 * 16 * 22
    "LatteTransformer3DModel": 1_024,  # each frame of 512 x 512 by itself: 32 * 32
    "MochiTransformer3DModel": 6_616,  # 19 frames of 480 x 848: 4 * 30 * 53 + 256
    "SkyReelsV2Transformer3DModel": 51_000,  # 97 frames of 544 x 960: 25 * 34 * 60
    "WanAnimateTransformer3DModel": 72_000,  # 77 frames of 720 x 1280: 20 * 45 * 80
    "WanTransformer3DModel": 32_760,  # 81 frames of 480 x 832: 21 * 30 * 52
    # Images of other sizes than 1024 x 1024, and of other compression than 16.
    "Ideogram4Transformer2DModel": 16_384,  # 2048 x 2048: 128 * 128
    "SanaTransformer2DModel": 1_024,  # VAE of factor 32: 32 * 32
    "JoyImageEditPlusTransformer3DModel": 8_704,  # as below
    "JoyImageEditTransformer3DModel": 8_704,  # an image and its edited version: 2 * 64 * 64 + 512
}
"""By class name; a subclass has the number of the nearest class listed here."""

OF_KIND: tuple[tuple[str, int], ...] = (("Audio", 1_024), ("1D", 1_024), ("3D", 32_760), ("Video", 32_760))
"""For classes not listed: the first of these parts that is in the name."""
IMAGE = 4_608
"""For all others: an image of 1024 x 1024 (64 * 64) with 512 tokens of text, as for Flux."""


def typical_tokens(cls: type) -> int:
    """The number of tokens to assume for a model of this class."""
    for each in cls.__mro__:
        if each.__name__ in TYPICAL_TOKENS:
            return TYPICAL_TOKENS[each.__name__]
    return next((tokens for part, tokens in OF_KIND if part in cls.__name__), IMAGE)
