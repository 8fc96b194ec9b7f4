"""Nucleus-Image: the image attends to image and text, with a mask of the text, which is split before every block.

Experts choose among all tokens of the image. So every rank computes these layers for the full image; only the other
layers become faster.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan

_GATHERED = advanced.CPGatherInput(1, 3, sequence="image")
_EXPERTS: InputPlan = {
    ParamId("hidden_states"): _GATHERED,
    ParamId("hidden_states_unmodulated"): _GATHERED,
    ParamId(index=0): CPInput(1, 3, split_output=True, sequence="image"),
}


def _plan(model: Any) -> Plan:
    experts = [index for index, block in enumerate(model.transformer_blocks) if block.moe_enabled]
    return {
        "pos_embed": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="image"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="text"),
        },
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
        "transformer_blocks.*": {
            # Zero tokens cannot be rotated.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
            # One value per key.
            ParamId("attention_kwargs"): {"attention_mask": CPInput(1, 2, sequence=("image", "text"))},
        },
        "transformer_blocks.*.attn": CPAttention(("image",), key=("image", "text")),
        **{f"transformer_blocks.{index}.img_mlp": _EXPERTS for index in experts},
        "proj_out": CPOutput(1, 3, sequence="image"),
    }


PLANS = {"NucleusMoEImageTransformer2DModel": _plan}
