"""diffusers' transformers in the configurations of real models, with random weights, so that nothing is downloaded.

`model.make(device)` returns the same weights and `model.inputs(device)` the same inputs on every rank. With `tiny`, the
classes have a size that runs quickly on a CPU, to try out a benchmark.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights as empty_parameters
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A model class with its configuration and the inputs of one step."""

    title: str
    model_class: str
    config: Mapping[str, Any]
    make_inputs: Callable[[], Inputs]
    dtype: torch.dtype = torch.bfloat16

    def make(self, device: torch.device, weights: Mapping[str, Tensor] | None = None, model_class: Any = None) -> Any:
        """The model in eval mode, cast as `from_pretrained(torch_dtype=...)` does: what the class lists to stay in
        float32 stays.

        Args:
            device: device of the model.
            weights: its parameters and persistent buffers, which are used without a copy. None draws them.
            model_class: a subclass of the model's class to make instead, with the same configuration.
        """
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with contextlib.ExitStack() as stack:
                for context in (torch.device(device),) if weights is None else (no_init_weights(), empty_parameters()):
                    stack.enter_context(context)
                model = (model_class or getattr(diffusers, self.model_class))(**self.config)
        finally:
            torch.set_default_dtype(usual)
        if weights is not None:
            model.load_state_dict(weights, assign=True)
            return model.to(device).eval().requires_grad_(False)
        keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if keep & set(name.split(".")):
                parameter.data = parameter.data.float()
        randomize(model, device)
        return model.eval().requires_grad_(False)

    def inputs(self, device: torch.device) -> Inputs:
        """Keyword arguments of the model's forward for a batch of one. Drawn on the CPU, so equal on all ranks."""
        floating = {torch.float32: self.dtype}
        return {
            name: value.to(device, floating.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value
            for name, value in self.make_inputs().items()
        }


@torch.no_grad()
def randomize(model: nn.Module, device: torch.device) -> None:
    """Sets random weights of unit gain: every block changes the output, and no softmax is uniform or saturated."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _flux(side: int, text: int, config: Mapping[str, Any]) -> Inputs:
    """Flux's inputs for an image of `side` x `side` tokens, of 16 x 16 pixels each."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": _normal(1, side * side, config["in_channels"], seed=0),
        "encoder_hidden_states": _normal(1, text, config["joint_attention_dim"], seed=1),
        "pooled_projections": _normal(1, config["pooled_projection_dim"], seed=2),
        "timestep": torch.tensor([0.5]),
        # The model multiplies this by 1,000, which bfloat16 holds exactly for 4.0. 3,500 would be rounded in eager mode
        # and not in a fused kernel, and random weights amplify the difference.
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def _wan(latent: tuple[int, int, int], text: int, config: Mapping[str, Any]) -> Inputs:
    return {
        "hidden_states": _normal(1, config["in_channels"], *latent, seed=0),
        "encoder_hidden_states": _normal(1, text, config["text_dim"], seed=1),
        "timestep": torch.tensor([500], dtype=torch.int64),
        "return_dict": False,
    }


def _qwen_image(side: int, text: int, config: Mapping[str, Any]) -> Inputs:
    """Qwen-Image's inputs for an image of `side` x `side` tokens, of 16 x 16 pixels each."""
    return {
        "hidden_states": _normal(1, side * side, config["in_channels"], seed=0),
        "encoder_hidden_states": _normal(1, text, config["joint_attention_dim"], seed=1),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
WAN_14B = WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 8}
"""All layers are alike, and some of them tell of all."""
QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
TINY_FLUX = FLUX | {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
TINY_QWEN_IMAGE = QWEN_IMAGE | {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
TINY_WAN = WAN | {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
}

REAL = {
    "flux": RealModel("Flux 1024²", "FluxTransformer2DModel", FLUX, lambda: _flux(64, 512, FLUX)),
    "wan": RealModel(
        "Wan 2.1 1.3B 480p, 81 frames", "WanTransformer3DModel", WAN, lambda: _wan((21, 60, 104), 512, WAN)
    ),
    "wan-14b": RealModel(
        "Wan 2.1 14B 480p, 81 frames, 8 of its 40 layers",
        "WanTransformer3DModel",
        WAN_14B,
        lambda: _wan((21, 60, 104), 512, WAN_14B),
    ),
    "wan-14b-whole": RealModel(
        "Wan 2.1 14B 480p, 49 frames",
        "WanTransformer3DModel",
        WAN_14B | {"num_layers": 40},
        lambda: _wan((13, 60, 104), 512, WAN_14B),
    ),
    "qwen-image": RealModel(
        "Qwen-Image 1024²",
        "QwenImageTransformer2DModel",
        QWEN_IMAGE,
        lambda: _qwen_image(64, 256, QWEN_IMAGE),
    ),
}
USUAL = ("flux", "wan")
TINY = {
    "flux": RealModel("tiny Flux", "FluxTransformer2DModel", TINY_FLUX, lambda: _flux(8, 32, TINY_FLUX), torch.float32),
    "wan": RealModel(
        "tiny Wan", "WanTransformer3DModel", TINY_WAN, lambda: _wan((3, 8, 8), 32, TINY_WAN), torch.float32
    ),
}
TINY["wan-14b"] = TINY["wan-14b-whole"] = TINY["wan"]
TINY["qwen-image"] = RealModel(
    "tiny Qwen-Image",
    "QwenImageTransformer2DModel",
    TINY_QWEN_IMAGE,
    lambda: _qwen_image(8, 32, TINY_QWEN_IMAGE),
    torch.float32,
)
