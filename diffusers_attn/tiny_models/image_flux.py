"""The Flux family: double blocks with a text and an image sequence, then single blocks over both."""

from __future__ import annotations

import torch

from .case import BATCH, GRID, IMAGE_TOKENS, TEXT, Config, Draw, Inputs, case

_FLUX_LIKE: Config = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
}
FLUX: Config = _FLUX_LIKE | {"pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}


def flux_inputs(draw: Draw) -> Inputs:
    """What the members of the Flux family have in common."""
    image_ids = draw.grid(1, *GRID)
    return {
        "hidden_states": draw.normal(BATCH, IMAGE_TOKENS, 16),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.times(),
        "img_ids": image_ids.to(draw.dtype),
        "txt_ids": torch.zeros(TEXT, 3).to(image_ids.device, draw.dtype),
    }


def joint_mask(draw: Draw) -> torch.Tensor:
    """Boolean mask of the joint sequence, [batch, text + image], False where the text is padded."""
    image_mask = torch.ones(BATCH, IMAGE_TOKENS, dtype=torch.bool, device=draw.device)
    return torch.cat([draw.mask(), image_mask], dim=1)


@case(
    "flux",
    "FluxTransformer2DModel",
    notes="[text, image] in double and single blocks, one processor class for both; no mask",
    **FLUX,
)
def flux(draw: Draw) -> Inputs:
    return flux_inputs(draw) | {"pooled_projections": draw.normal(BATCH, 24), "guidance": draw.guidance()}


@case(
    "flux2",
    "Flux2Transformer2DModel",
    notes="single blocks use another attention class, which fuses the MLP into the attention's projections",
    **_FLUX_LIKE,
    timestep_guidance_channels=32,
    axes_dims_rope=(4, 4, 4, 4),
)
def flux2(draw: Draw) -> Inputs:
    # Coordinates are [batch, tokens, (time, height, width, position in the text)].
    image_ids = draw.grid(1, *GRID, 1).expand(BATCH, -1, -1)
    text_ids = draw.grid(1, 1, 1, TEXT).expand(BATCH, -1, -1)
    return flux_inputs(draw) | {"img_ids": image_ids, "txt_ids": text_ids, "guidance": draw.guidance()}


_CHROMA: Config = _FLUX_LIKE | {
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 2,
}


@case(
    "chroma",
    "ChromaTransformer2DModel",
    notes="boolean [batch, tokens] mask, made a [batch, 1, tokens, tokens] outer product in every block",
    **_CHROMA,
)
def chroma(draw: Draw) -> Inputs:
    return flux_inputs(draw) | {"attention_mask": joint_mask(draw)}


@case(
    "chroma_float_mask",
    "ChromaTransformer2DModel",
    notes="the mask as diffusers' pipeline makes it: 1.0 and 0.0, which attention then adds to the logits",
    **_CHROMA,
)
def chroma_float_mask(draw: Draw) -> Inputs:
    inputs = chroma(draw)
    return inputs | {"attention_mask": inputs["attention_mask"].to(draw.dtype)}


@case(
    "flux3",
    "Flux3Transformer2DModel",
    notes="a third sequence, of a reference image",
    **_FLUX_LIKE,
    cond_in_channels=8,
    timestep_channels=32,
    axes_dims_rope=(4, 4, 4, 4),
)
def flux3(draw: Draw) -> Inputs:
    inputs = flux2(draw)
    del inputs["guidance"]
    inputs["image_cond_hidden_states"] = draw.normal(BATCH, 7, 8)
    inputs["image_cond_ids"] = draw.grid(1, 7, 1, 1).expand(BATCH, -1, -1)
    return {name: value[0] if name.endswith("_ids") else value for name, value in inputs.items()}


@case("bria", "BriaTransformer2DModel", **_FLUX_LIKE, axes_dims_rope=(4, 6, 6))
def bria(draw: Draw) -> Inputs:
    return flux_inputs(draw)


@case("longcat_image", "LongCatImageTransformer2DModel", **_FLUX_LIKE, axes_dims_rope=(4, 6, 6))
def longcat_image(draw: Draw) -> Inputs:
    return flux_inputs(draw)


@case("ovis_image", "OvisImageTransformer2DModel", **_FLUX_LIKE, out_channels=16, axes_dims_rope=(4, 6, 6))
def ovis_image(draw: Draw) -> Inputs:
    return flux_inputs(draw)


@case(
    "bria_fibo",
    "BriaFiboTransformer2DModel",
    notes="single blocks use another attention class; a [batch, 1, 1, tokens] boolean mask, made by the caller",
    **_FLUX_LIKE,
    text_encoder_dim=16,
    axes_dims_rope=(4, 6, 6),
)
def bria_fibo(draw: Draw) -> Inputs:
    mask = joint_mask(draw)[:, None, None]
    return flux_inputs(draw) | {
        "text_encoder_layers": [draw.normal(BATCH, TEXT, 16) for _ in range(4)],  # one for every block
        "joint_attention_kwargs": {"attention_mask": mask},
    }
