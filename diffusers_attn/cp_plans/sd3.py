"""Stable Diffusion 3: image and text, joined in every block. In blocks of 3.5, the image also attends to itself.

They are split where they are embedded, since guidance may skip the first block.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_ADAPTER = advanced.CPForbidden(
    "an IP-Adapter joins its image's keys, which are replicated, with those of the picture, which are split. "
    "Take the adapter off (pipe.unload_ip_adapter()), or run on one device."
)

PLANS: dict[str, Plan] = {
    "SD3Transformer2DModel": {
        "": {
            ParamId("block_controlnet_hidden_states"): CPInput(1, 3, sequence="image"),
            ParamId("joint_attention_kwargs"): {"ip_adapter_image_embeds": _ADAPTER, "ip_hidden_states": _ADAPTER},
        },
        "pos_embed": {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="image")},
        # Zero tokens cannot be reshaped to heads.
        "context_embedder": {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="text")},
        "transformer_blocks.*.attn": CPAttention(("image", "text")),
        "transformer_blocks.*.attn2?": CPAttention(("image",)),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
