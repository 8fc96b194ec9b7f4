"""Random IP-Adapters that fit the zoo's models, in the form in which their loaders take them."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection

from ..zoo import BATCH

EMBEDDING, TOKENS, CROSS, WIDTH = 8, 4, 32, 64


def image_embeds(dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1, 1, BATCH * EMBEDDING).reshape(BATCH, 1, EMBEDDING).to(dtype)


def load_flux(model):
    torch.manual_seed(0)
    shapes = {"weight": (WIDTH, CROSS), "bias": (WIDTH,)}
    attention = {
        f"{block}.to_{name}_ip.{kind}": torch.randn(shape) / 5
        for block in range(model.config.num_layers)
        for name in "kv"
        for kind, shape in shapes.items()
    }
    model._load_ip_adapter_weights([{"image_proj": _image_projection(), "ip_adapter": attention}])


def load_unet(model):
    torch.manual_seed(0)
    cross = [name.removesuffix(".processor") for name in model.attn_processors if name.endswith("attn2.processor")]
    attention = {
        f"{2 * index + 1}.to_{name}_ip.weight": torch.randn(model.get_submodule(module).to_k.out_features, CROSS) / 5
        for index, module in enumerate(cross)
        for name in "kv"
    }
    model._load_ip_adapter_weights([{"image_proj": _image_projection(), "ip_adapter": attention}])


def load_sd3(model):
    torch.manual_seed(0)
    attention = {}
    for block in range(model.config.num_layers):
        processor = SD3IPAdapterJointAttnProcessor2_0(WIDTH, WIDTH, head_dim=16, timesteps_emb_dim=WIDTH)
        attention |= {f"{block}.{name}": value for name, value in processor.state_dict().items()}
    projection = IPAdapterTimeImageProjection(EMBEDDING, WIDTH, WIDTH, heads=1, num_queries=TOKENS, timestep_in_dim=16)
    model._load_ip_adapter_weights({"image_proj": projection.state_dict(), "ip_adapter": attention})


def _image_projection() -> dict[str, torch.Tensor]:
    projection = ImageProjection(EMBEDDING, CROSS, num_image_text_embeds=TOKENS)
    return {name.replace("image_embeds", "proj"): value for name, value in projection.state_dict().items()}
