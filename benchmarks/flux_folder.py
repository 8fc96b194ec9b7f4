"""What trainers of Flux are given, made here and not downloaded: the folder of a Flux pipeline, and images.

All parts are of the real classes and save like any pipeline; weights are random. Of the real size are the transformer
and the VAE. The text encoders, which run once per caption and not in a step, have the real ones' outputs and two small
layers; their tokenizers are those of `examples/tiny_flux`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import real_shapes
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from real_shapes import randomize
from wan_folder import write_folder

TINY_FLUX = Path(__file__).resolve().parent.parent / "examples" / "tiny_flux"
CAPTION = "a photo of clouds in many colours"
REAL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_VAE = REAL_VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def make_pipeline(tiny: bool, folder: Path, device: torch.device) -> Path:
    """A pipeline in `folder`, unless it is there already."""
    real = (real_shapes.TINY if tiny else real_shapes.REAL)["flux"]

    def write(unfinished: Path) -> None:
        clip = transformers.CLIPTextConfig.from_pretrained(TINY_FLUX / "text_encoder")
        clip.hidden_size, clip.intermediate_size = real.config["pooled_projection_dim"], 256
        width = real.config["joint_attention_dim"]
        t5 = transformers.T5Config.from_pretrained(TINY_FLUX / "text_encoder_2", d_model=width)
        with torch.device(device):
            vae = diffusers.AutoencoderKL(**(TINY_VAE if tiny else REAL_VAE))
            encoders = [transformers.CLIPTextModel(clip), transformers.T5EncoderModel(t5)]
        for model in (vae, *encoders):
            randomize(model, device)
        diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae.eval(),
            text_encoder=encoders[0].eval(),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(TINY_FLUX / "tokenizer"),
            text_encoder_2=encoders[1].eval(),
            tokenizer_2=transformers.T5Tokenizer.from_pretrained(TINY_FLUX / "tokenizer_2"),
            transformer=real.make(device),
        ).save_pretrained(unfinished)

    return write_folder(folder, write)


def make_images(side: int, folder: Path, number: int, captions: bool) -> Path:
    """Square images in `folder`, unless they are there already: clouds of random colours.

    Args:
        side: side in pixels.
        folder: the folder.
        number: how many images.
        captions: whether a file with `CAPTION` is beside each.
    """

    def write(unfinished: Path) -> None:
        unfinished.mkdir(parents=True)
        for i in range(number):
            coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            pixels: Any = F.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1).mul(255).byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished / f"{i}.png")
            if captions:
                (unfinished / f"{i}.txt").write_text(CAPTION)

    return write_folder(folder, write)
