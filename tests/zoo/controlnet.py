"""ControlNets: half a model, which returns a tensor for every block of the whole one."""

from __future__ import annotations

from .case import BATCH, IMAGE_TOKENS, Draw, Inputs, case
from .image_flux import FLUX, flux
from .unet import HEIGHT, SMALL, WIDTH, unet_inputs


@case("flux_controlnet", "FluxControlNetModel", notes="attention of Flux", **FLUX)
def flux_controlnet(draw: Draw) -> Inputs:
    return flux(draw) | {"controlnet_cond": draw.normal(BATCH, IMAGE_TOKENS, 16), "conditioning_scale": 0.5}


@case(
    "sd_controlnet",
    "ControlNetModel",
    notes="attention of UNet2DConditionModel",
    **SMALL,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    conditioning_embedding_out_channels=(4, 8),
)
def sd_controlnet(draw: Draw) -> Inputs:
    # The condition is an image, here of twice the latents' size.
    return unet_inputs(draw) | {"controlnet_cond": draw.normal(BATCH, 3, 2 * HEIGHT, 2 * WIDTH)}
