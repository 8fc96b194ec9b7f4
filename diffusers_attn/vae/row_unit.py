"""The number of rows of an image that become one row of latents."""

from __future__ import annotations

from torch import nn

_UNKNOWN = 32
"""Used where a VAE does not state it. A multiple of the true number is right, too: ranks then share less evenly."""


def row_unit(vae: nn.Module) -> int:
    """Rows per row of latents, from the attributes of diffusers' VAEs."""
    config = getattr(vae, "config", {})
    for ratio in (
        vars(vae).get("spatial_compression_ratio"),
        config.get("spatial_compression_ratio"),
        config.get("scale_factor_spatial"),
    ):
        if isinstance(ratio, int) and ratio > 0:
            return ratio
    for name in ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "ch_mult"):
        if config.get(name):
            return 2 ** (len(config[name]) - 1)
    return _UNKNOWN
