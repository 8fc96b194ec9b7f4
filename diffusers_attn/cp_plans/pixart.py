"""PixArt, DiT and the transformers inside old UNets: self-attention over the image; attention to text is local.

The text is replicated, with its mask. A mask of the image covers all keys.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_SPLIT: Plan = {"transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")}}
_SELF = CPAttention(("image",), key_mask=True)
_CROSS = CPAttention(("image",), key=())
# This kind of block attends to the text if it gets one, else to the image.
_TEXT = advanced.CPRequired("its cross-attention then attends to the image, which is split. Give it a text.")
_NO_TEXT = advanced.CPForbidden(
    "with double_self_attention its second attention then attends to the text instead. Leave it out."
)


def _of_basic_blocks(model: Any) -> Plan:
    """The plan for a model whose configuration decides to what its two attentions attend. Some have only one."""
    config = model.config
    cross = config.only_cross_attention or (config.cross_attention_dim is not None and not config.double_self_attention)
    text = _NO_TEXT if config.double_self_attention else _TEXT if cross else None
    return {
        **({} if text is None else {"": {ParamId("encoder_hidden_states"): text}}),
        **_SPLIT,
        "transformer_blocks.*.attn1?": _CROSS if config.only_cross_attention else _SELF,
        "transformer_blocks.*.attn2?": _SELF if config.double_self_attention else _CROSS,
        # The layers after it depend on the configuration, and put tokens back to their positions.
        "transformer_blocks.-1": CPOutput(1, 3, sequence="image"),
    }


PLANS = {
    "PixArtTransformer2DModel": {
        **_SPLIT,
        "transformer_blocks.*.attn1": _SELF,
        "transformer_blocks.*.attn2": _CROSS,
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
    "DiTTransformer2DModel": {
        **_SPLIT,
        "transformer_blocks.*.attn1": _SELF,
        "proj_out_2": CPOutput(1, 3, sequence="image"),
    },
    "Transformer2DModel": _of_basic_blocks,
    "DreamLiteTransformer2DModel": _of_basic_blocks,
}
