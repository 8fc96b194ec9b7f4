"""Motif-Video: video, image and text, joined in every block, with a mask; some then attend to the text once more.

That attention takes the text's part of tokens and mask by the image's length, so that all three are split each on its
own, and the mask with them. Blocks cut image and text off by their length, from the end, where none would mean all. The
last blocks, if there are such, decode: video from the start, joined with what became of it, without text or mask.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, Entry, ParamId, Plan

_CONDITION = ("image", "text")
_JOINED = ("video", *_CONDITION)


def _plan(model: Any) -> Plan:
    single, decoders = model.config.num_single_layers, model.config.num_decoder_layers
    # Behind "rope", which gives the video's length.
    blocks: Entry = {
        ParamId("image_embed_seq_len"): advanced.CPLength("image"),
        ParamId("attention_mask"): CPInput(3, 4, sequence=_JOINED),
    }
    plan: dict[str, Any] = {
        "rope": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="video"),
        },
        "transformer_blocks.*": blocks,
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence=_CONDITION),
        },
        "transformer_blocks.*.attn": CPAttention(_JOINED),
        "transformer_blocks.*.cross_attn?": CPAttention(("video",), key=("text",)),
        "proj_out": CPOutput(1, 3, sequence="video"),
    }
    for block in range(single - decoders):
        plan |= {
            f"single_transformer_blocks.{block}": blocks,
            f"single_transformer_blocks.{block}.attn": CPAttention(_JOINED),
            f"single_transformer_blocks.{block}.cross_attn?": CPAttention(("video",), key=("text",)),
        }
    for block in range(single - decoders, single):
        plan[f"single_transformer_blocks.{block}.attn"] = CPAttention(("video", "video"))
    if decoders:
        plan[f"single_transformer_blocks.{single - decoders}"] = {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video")
        }
    return plan


PLANS = {"MotifVideoTransformer3DModel": _plan}
